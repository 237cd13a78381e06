/* stacks_library.c: a library with a thread of its own and a call that waits; built under several names. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static void *own(void *unused)
{
    pause();
    return unused;
}

/* Start a thread of the library, which waits in the library. */
int begin(void)
{
    pthread_t thread;
    return pthread_create(&thread, 0, own, 0);
}

/* Wait in the library, below a frame with some bytes of its own. */
int wait_here(void)
{
    volatile char room[4096];
    room[0] = 1;
    int done = pause();
    return done + room[0];
}

/* Wait in a function of the caller. */
int wait_there(int (*other)(void))
{
    int done = other();
    return done + 1;
}
