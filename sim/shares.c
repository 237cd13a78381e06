/* Memory that several processes hold. It counts for the one that made it while that one holds it, then for the one that
 * came next; a descriptor that stands for it keeps it alive too, in nobody's name. When the last of them has gone, so
 * has the memory. Contents are a file that the processes map; nobody looks at it here. */
#include "simd.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct holder {
    struct client *client;
    uint64_t context; /* of the memory; 0: the process's */
    uint32_t refs;
};

struct share {
    bool exists;
    struct sim_share is;
    int file;
    struct holder *holders; /* oldest first: the memory counts for that one */
    uint32_t n_holders;
    uint32_t n_exports;
};

struct export
{
    bool exists;
    int end; /* ours of a pair of sockets */
    ino_t inode;
    struct share *share;
};

static struct share shares[SIM_MAX_SHARES];
static struct export exports[SIM_MAX_EXPORTS];

static struct share *find(const uint64_t *key)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++)
        if (s->exists && s->is.key[0] == key[0] && s->is.key[1] == key[1]) return s;
    return NULL;
}

static struct holder *find_holder(const struct share *share, const struct client *client)
{
    for (uint32_t i = 0; i < share->n_holders; i++)
        if (share->holders[i].client == client) return &share->holders[i];
    return NULL;
}

/* Memory that came from another process belongs to no context of the new holder. */
static struct holding *holding_of(const struct share *share, const struct holder *holder)
{
    if (!holder->context) return &holder->client->own[share->is.device];
    return ledger_holding(holder->client, share->is.device, share->is.kind, holder->context);
}

static void count_for(const struct share *share, const struct holder *holder)
{
    struct holding *holding = holding_of(share, holder);
    holding->bytes[share->is.kind] += share->is.bytes;
    holding->shared[share->is.kind] += share->is.bytes;
}

static void count_no_more(const struct share *share, const struct holder *holder)
{
    struct holding *holding = holding_of(share, holder);
    holding->bytes[share->is.kind] -= share->is.bytes;
    holding->shared[share->is.kind] -= share->is.bytes;
}

static void end_if_unheld(struct share *share)
{
    if (share->n_holders || share->n_exports) return;
    ledger_let_go(share->is.device, share->is.bytes);
    close(share->file);
    free(share->holders);
    *share = (struct share){0};
}

/* A device's total stays as it is; only in whose name the memory is changes. The driver's own is its total less all
 * names, so `used` moves with it. */
static void leave(struct share *share, struct holder *holder)
{
    bool was_first = holder == share->holders;
    if (was_first) count_no_more(share, holder);
    share->n_holders--;
    memmove(holder, holder + 1, (size_t)(share->holders + share->n_holders - holder) * sizeof *holder);
    if (!was_first) return;
    server.gpus[share->is.device].used -= share->is.bytes;
    if (share->n_holders) {
        count_for(share, share->holders);
        server.gpus[share->is.device].used += share->is.bytes;
    } else {
        ledger_keep(share->is.device, share->is.bytes);
        end_if_unheld(share);
    }
}

static enum sim_status join(struct share *share, struct client *client)
{
    struct holder *holder = find_holder(share, client);
    if (holder) {
        holder->refs++;
        return SIM_OK;
    }
    struct holder *grown = realloc(share->holders, (share->n_holders + 1) * sizeof *grown);
    if (!grown) return SIM_NO_MEMORY;
    share->holders = grown;
    grown[share->n_holders++] = (struct holder){.client = client, .refs = 1};
    if (share->n_holders > 1) return SIM_OK;
    ledger_let_go(share->is.device, share->is.bytes);
    server.gpus[share->is.device].used += share->is.bytes;
    count_for(share, grown);
    return SIM_OK;
}

enum sim_status share_new(struct client *client, const struct sim_request *request, int file, struct sim_share *out)
{
    struct holding *holding = ledger_holding(client, request->device, request->kind, request->context);
    uint32_t kind = request->kind;
    bool shareable = kind == SIM_BLOCK || kind == SIM_VMM;
    if (!holding || !shareable || !request->bytes || file < 0 ||
        holding->bytes[kind] - holding->shared[kind] < request->bytes)
        return SIM_NOT_ALLOWED;
    struct share *share = shares;
    while (share < shares + SIM_MAX_SHARES && share->exists) share++;
    if (share == shares + SIM_MAX_SHARES) return SIM_NO_MEMORY;
    struct share made = {.exists = true, .is = {.bytes = request->bytes, .device = request->device, .kind = kind}};
    if (getrandom(made.is.key, sizeof made.is.key, 0) != sizeof made.is.key) return SIM_NO_MEMORY;
    made.holders = malloc(sizeof *made.holders);
    made.file = made.holders ? fcntl(file, F_DUPFD_CLOEXEC, 0) : -1;
    if (made.file < 0) {
        free(made.holders);
        return SIM_NO_MEMORY;
    }
    made.holders[0] = (struct holder){.client = client, .context = request->context, .refs = 1};
    made.n_holders = 1;
    holding->shared[kind] += request->bytes;
    *share = made;
    *out = made.is;
    return SIM_OK;
}

static enum sim_status hand_out(struct share *share, struct client *client, struct sim_share *out, int *file)
{
    enum sim_status status = share ? join(share, client) : SIM_NOT_ALLOWED;
    if (status) return status;
    *out = share->is;
    *file = share->file;
    return SIM_OK;
}

enum sim_status share_open(struct client *client, const uint64_t *key, struct sim_share *out, int *file)
{
    return hand_out(find(key), client, out, file);
}

/* A socket's inode is its own while it is open, and it is open: the peer has just sent it. */
enum sim_status share_import(struct client *client, int descriptor, struct sim_share *out, int *file)
{
    struct stat st;
    if (descriptor < 0 || fstat(descriptor, &st) || !S_ISSOCK(st.st_mode)) return SIM_NOT_ALLOWED;
    for (const struct export *e = exports; e < exports + SIM_MAX_EXPORTS; e++)
        if (e->exists && e->inode == st.st_ino) return hand_out(e->share, client, out, file);
    return SIM_NOT_ALLOWED;
}

enum sim_status share_export(const struct client *client, const uint64_t *key, int *descriptor)
{
    struct share *share = find(key);
    if (!share || !find_holder(share, client)) return SIM_NOT_ALLOWED;
    struct export *export = exports;
    while (export < exports + SIM_MAX_EXPORTS && export->exists) export ++;
    int ends[2];
    if (export == exports + SIM_MAX_EXPORTS || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return SIM_NO_MEMORY;
    struct stat st;
    struct epoll_event event = {.events = 0, .data.u64 = TAG_EXPORT + (uint64_t)(export - exports)};
    if (fstat(ends[1], &st) || shutdown(ends[0], SHUT_RD) || epoll_ctl(server.epoll, EPOLL_CTL_ADD, ends[0], &event)) {
        close(ends[0]);
        close(ends[1]);
        return SIM_NO_MEMORY;
    }
    *export = (struct export){.exists = true, .end = ends[0], .inode = st.st_ino, .share = share};
    share->n_exports++;
    *descriptor = ends[1];
    return SIM_OK;
}

void share_export_ends(uint32_t index)
{
    struct export *export = &exports[index];
    if (index >= SIM_MAX_EXPORTS || !export->exists) return;
    close(export->end);
    export->exists = false;
    export->share->n_exports--;
    end_if_unheld(export->share);
}

/* False: it holds no such thing. */
bool share_drop(struct client *client, const uint64_t *key)
{
    struct share *share = find(key);
    struct holder *holder = share ? find_holder(share, client) : NULL;
    if (!holder) return false;
    if (!--holder->refs) leave(share, holder);
    return true;
}

/* The context's memory goes as a whole, whatever else its process has opened. */
void shares_leave_context(struct client *client, uint64_t context)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++) {
        struct holder *holder = s->exists ? find_holder(s, client) : NULL;
        if (holder && holder->context == context) leave(s, holder);
    }
}

void shares_leave(struct client *client)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++) {
        struct holder *holder = s->exists ? find_holder(s, client) : NULL;
        if (holder) leave(s, holder);
    }
}

void shares_end(void)
{
    for (uint32_t i = 0; i < SIM_MAX_EXPORTS; i++) share_export_ends(i);
}
