/* crowd SOCKET HELLO COUNT: COUNT processes of this cgroup send HELLO (in hexadecimal) and then live until standard
 * input ends. Prints how many were answered. */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_SECONDS 20
#define ANSWER_MS 1000

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static unsigned char hello[512];
static size_t hello_bytes;

static int attempt(void)
{
    char answer[512];
    int is_answered = 0, peer = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (!connect(peer, (struct sockaddr *)&address, sizeof address) &&
        send(peer, hello, hello_bytes, MSG_NOSIGNAL) == (ssize_t)hello_bytes) {
        struct pollfd waits = {.fd = peer, .events = POLLIN};
        is_answered = poll(&waits, 1, ANSWER_MS) == 1 && recv(peer, answer, sizeof answer, 0) > 0;
    }
    close(peer);
    return is_answered;
}

static char say_hello(void)
{
    time_t end = time(NULL) + PATIENCE_SECONDS;
    while (time(NULL) < end) {
        if (attempt()) return 'y';
        usleep(20000);
    }
    return 'n';
}

static void live(int results, int stay)
{
    char word = say_hello();
    if (write(results, &word, 1) != 1) _exit(1);
    _exit(read(stay, &word, 1) != 0);
}

int main(int count, char **words)
{
    if (count != 4) return 2;
    int results[2], stay[2], number = atoi(words[3]), answered = 0;
    strncpy(address.sun_path, words[1], sizeof address.sun_path - 1);
    for (const char *hex = words[2]; hex[0] && hello_bytes < sizeof hello; hex += 2, hello_bytes++)
        if (sscanf(hex, "%2hhx", &hello[hello_bytes]) != 1) return 2;
    if (pipe(results) || pipe(stay)) return 1;
    for (int i = 0; i < number; i++) {
        pid_t child = fork();
        if (child < 0) return 1;
        if (!child) {
            close(stay[1]);
            live(results[1], stay[0]);
        }
    }
    for (int i = 0; i < number; i++) {
        char word;
        if (read(results[0], &word, 1) != 1) return 1;
        answered += word == 'y';
    }
    printf("%d\n", answered);
    fflush(stdout);
    char rest;
    while (read(STDIN_FILENO, &rest, 1) > 0) continue;
    close(stay[1]);
    while (wait(NULL) > 0) continue;
    return 0;
}
