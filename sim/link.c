#include "link.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

/* Called with the lock held. A dead server stays dead for this process: its memory is gone with it, as after a driver
 * unload. */
static void drop(struct link *link)
{
    if (link->sock >= 0) close(link->sock);
    link->sock = -1;
}

int link_open(struct link *link, const char *dir, uint32_t *n_devices)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (snprintf(address.sun_path, sizeof address.sun_path, "%s/" SIM_SOCKET_NAME, dir) >= (int)sizeof address.sun_path)
        return -1;
    pthread_mutex_lock(&link->lock);
    drop(link);
    link->owner = getpid();
    link->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (link->sock >= 0 && connect(link->sock, (struct sockaddr *)&address, sizeof address)) drop(link);
    pthread_mutex_unlock(&link->lock);
    struct sim_reply reply;
    if (link_call(link, (struct sim_request){.op = SIM_HELLO}, &reply, NULL, 0) != SIM_OK) return -1;
    *n_devices = reply.count < SIM_MAX_DEVICES ? reply.count : SIM_MAX_DEVICES;
    return 0;
}

void link_close(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    drop(link);
    pthread_mutex_unlock(&link->lock);
}

/* SEQPACKET keeps messages whole, so there are no halves to put together. */
static int exchange(int sock, const struct sim_request *request, struct sim_reply *reply, void *payload, size_t room)
{
    ssize_t n;
    do n = send(sock, request, sizeof *request, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n != sizeof *request) return -1;
    struct iovec parts[2] = {{reply, sizeof *reply}, {payload, room}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    do n = recvmsg(sock, &message, 0);
    while (n < 0 && errno == EINTR);
    return n >= (ssize_t)sizeof *reply && reply->magic == SIM_MAGIC && reply->op == request->op ? 0 : -1;
}

/* errno is the program's: a CUDA call must not change it. */
int link_call(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room)
{
    struct sim_reply unread;
    int status = -1, saved = errno;
    if (!reply) reply = &unread;
    request.magic = SIM_MAGIC;
    pthread_mutex_lock(&link->lock);
    if (link->sock >= 0) {
        if (exchange(link->sock, &request, reply, payload, room))
            drop(link);
        else
            status = (int)reply->status;
    }
    pthread_mutex_unlock(&link->lock);
    errno = saved;
    return status;
}
