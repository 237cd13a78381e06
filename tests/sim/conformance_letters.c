/* Messages between the actors and the director, with descriptors. */
#define _GNU_SOURCE
#include "conformance_actors.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

int post(int sock, const struct order *order, const int *files, unsigned n)
{
    union {
        char bytes[CMSG_SPACE(MOST_FILES * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {(void *)order, sizeof *order};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (n) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(n * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(first), files, n * sizeof(int));
    }
    return sendmsg(sock, &header, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int collect(int sock, struct order *order)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {order, sizeof *order};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int file = -1;
    order->act = ACT_END;
    if (recvmsg(sock, &header, MSG_CMSG_CLOEXEC) <= 0) return -1;
    const struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) memcpy(&file, CMSG_DATA(first), sizeof file);
    return file;
}
