/* reasons.c: see reasons.h. */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <syslog.h>
#include <unistd.h>

#include "reasons.h"

const char *reasons_log;
static char said[1024]; /* the last report */

/* Write to the system's log alone: the stderr of a runtime is the container's own. */
void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(said, sizeof said, format, arguments);
    va_end(arguments);
    openlog("fgpu-oci", LOG_PID, LOG_DAEMON);
    syslog(LOG_WARNING, "%s", said);
}

/* containerd, and so Docker, shows the last message of level error in the runtime's log. */
int refuse(const char *what)
{
    char text[2 * sizeof said];
    snprintf(text, sizeof text, "%s%s%s", what, *said ? ": " : "", said);
    syslog(LOG_ERR, "container not started: %s", text);
    dprintf(2, "fgpu: %s\n", text);
    for (char *at = text; *at; at++)
        if (*at == '"' || *at == '\\' || (unsigned char)*at < ' ') *at = '\'';
    int fd = reasons_log ? open(reasons_log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (fd >= 0) {
        dprintf(fd, "{\"level\":\"error\",\"msg\":\"fgpu: %s\"}\n", text);
        close(fd);
    }
    return 1;
}
