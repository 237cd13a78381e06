#include "link.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

/* Called with the lock. After the server has exited, no later call connects again, because the memory of this process
 * does not exist any more, as after the driver was unloaded. Only link_open connects. */
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

/* Room for one descriptor beside a message. */
union control {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

static ssize_t send_request(int sock, const struct sim_request *request, int file)
{
    union control control = {0};
    struct iovec part = {(void *)request, sizeof *request};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (file >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof file);
        memcpy(CMSG_DATA(header), &file, sizeof file);
    }
    ssize_t n;
    do n = sendmsg(sock, &message, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n;
}

static int take_file(struct msghdr *message)
{
    int file = -1;
    const struct cmsghdr *header = CMSG_FIRSTHDR(message);
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
        memcpy(&file, CMSG_DATA(header), sizeof file);
    return file;
}

/* SEQPACKET keeps messages whole, so that there are no parts to join. */
static int exchange(int sock, const struct sim_request *request, struct sim_reply *reply, void *payload, size_t room,
                    int *file)
{
    union control control = {0};
    ssize_t n = send_request(sock, request, file ? *file : -1);
    if (n != sizeof *request) return -1;
    struct iovec parts[2] = {{reply, sizeof *reply}, {payload, room}};
    struct msghdr message = {
        .msg_iov = parts, .msg_iovlen = 2, .msg_control = &control, .msg_controllen = sizeof control};
    do n = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    int got = n > 0 ? take_file(&message) : -1;
    if (file)
        *file = got;
    else if (got >= 0)
        close(got);
    return n >= (ssize_t)sizeof *reply && reply->magic == SIM_MAGIC && reply->op == request->op ? 0 : -1;
}

/* Keeps errno, which belongs to the program: a CUDA call must not change it. */
int link_call_file(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room,
                   int *file)
{
    struct sim_reply unread;
    int status = -1, saved = errno;
    if (!reply) reply = &unread;
    request.magic = SIM_MAGIC;
    pthread_mutex_lock(&link->lock);
    if (link->sock >= 0) {
        if (exchange(link->sock, &request, reply, payload, room, file))
            drop(link);
        else
            status = (int)reply->status;
    }
    pthread_mutex_unlock(&link->lock);
    errno = saved;
    return status;
}

int link_call(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room)
{
    return link_call_file(link, request, reply, payload, room, NULL);
}
