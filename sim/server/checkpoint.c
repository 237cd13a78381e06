/* What one process does with another by cuCheckpointProcess*. The target's calls stop at its gate, in memory that the
 * target and the server share. A thread of the target, the restore thread, takes and frees the host memory for the
 * copy, so that its cgroup is charged. A call that has begun goes on without its caller. */
#include "server/state.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A test machine has less memory than the devices that it simulates: the copy takes the first 64 MiB in full, and a
 * 64th of the rest. */
#define IN_FULL (64ull << 20)
#define PART 64

static uint32_t read_word(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

static void write_word(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }

static void wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static void show_devices(const struct client *client)
{
    for (uint32_t i = 0; i < server.n_gpus; i++) write_word(&client->checkpoint.gate->devices[i], client->devices[i]);
}

int checkpoint_gate(struct client *client)
{
    int file = memfd_create("gate", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0) return -1;
    void *gate = MAP_FAILED;
    if (!ftruncate(file, sizeof *client->checkpoint.gate) &&
        !fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        gate = mmap(NULL, sizeof *client->checkpoint.gate, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (gate == MAP_FAILED) {
        close(file);
        return -1;
    }
    client->checkpoint.gate = gate;
    show_devices(client);
    return file;
}

void checkpoint_end(struct client *client)
{
    if (client->checkpoint.gate) munmap(client->checkpoint.gate, sizeof *client->checkpoint.gate);
    client->checkpoint.gate = NULL;
}

void checkpoint_caller_ends(const struct client *caller)
{
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS && server.n_busy; c++)
        if (c->checkpoint.caller == caller) c->checkpoint.caller = NULL;
}

static bool has_ended(const struct client *client) { return client->state != CLIENT_OPEN || client->has_ended; }

static struct client *find(const struct client *asker, uint64_t pid)
{
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++)
        if (c->state != CLIENT_FREE && !has_ended(c) && c->checkpoint.gate && (uint64_t)view_pid(c, asker) == pid)
            return c;
    return NULL;
}

/* Returns the last pid in the line NSpid of a thread, which is its id in its own pid namespace. */
static uint32_t inner_id(pid_t process, const char *thread)
{
    char path[320], line[512];
    uint32_t id = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%s/status", process, thread);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "NSpid:", 6)) id = (uint32_t)strtoul(strrchr(line, '\t'), NULL, 10);
    if (file) fclose(file);
    return id;
}

/* Returns the id of the restore thread in the server's pid namespace; 0: there is none. */
static uint32_t thread_of(const struct client *client)
{
    char path[64];
    uint32_t wanted = read_word(&client->checkpoint.gate->thread), found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", client->process.pid[0]);
    DIR *folder = wanted ? opendir(path) : NULL;
    for (const struct dirent *entry; folder && !found && (entry = readdir(folder));)
        if (entry->d_name[0] != '.' && inner_id(client->process.pid[0], entry->d_name) == wanted)
            found = (uint32_t)strtoul(entry->d_name, NULL, 10);
    if (folder) closedir(folder);
    return found;
}

static void gate_close(struct client *client, bool is_closed)
{
    write_word(&client->checkpoint.gate->is_closed, is_closed);
    if (!is_closed) wake(&client->checkpoint.gate->is_closed);
}

static void give_order(struct client *client, uint32_t what)
{
    struct sim_gate *gate = client->checkpoint.gate;
    uint64_t bytes = ledger_bytes(client);
    __atomic_store_n(&gate->bytes, bytes < IN_FULL ? bytes : IN_FULL + (bytes - IN_FULL) / PART, __ATOMIC_SEQ_CST);
    write_word(&gate->what, what);
    write_word(&gate->order, read_word(&gate->order) + 1);
    wake(&gate->order);
}

/* Moves the process as the pairs of the request say, and back if it has no room there. All devices have one model. */
static enum sim_status restore(struct client *target, const struct sim_request *request)
{
    uint32_t to[SIM_MAX_DEVICES], back[SIM_MAX_DEVICES];
    if (request->parties && request->parties != server.n_gpus) return SIM_NO_DEVICE;
    for (uint32_t i = 0; request->parties && i < server.n_gpus; i++) {
        to[i] = request->key >> SIM_PLACE_BITS * i & (SIM_MAX_DEVICES - 1);
        if (to[i] >= server.n_gpus) return SIM_NO_DEVICE;
        back[to[i]] = i;
    }
    if (request->parties) ledger_move(target, to);
    bool has_room = limits_allow_return(target) && ledger_unpark(target);
    if (request->parties && !has_room) ledger_move(target, back);
    if (request->parties && has_room) turns_leave(target, 0);
    show_devices(target);
    return has_room ? SIM_OK : SIM_NO_MEMORY;
}

static bool has_done_order(const struct client *client)
{
    return read_word(&client->checkpoint.gate->done) == read_word(&client->checkpoint.gate->order);
}

/* Ends a call that is not in progress yet. */
static enum sim_status refuse(struct client *target, const struct sim_request *request)
{
    uint32_t call = request->kind;
    static const enum process_state needs[SIM_CHECKPOINTS] = {
        [SIM_LOCK] = IS_RUNNING, [SIM_PARK] = IS_LOCKED, [SIM_RESTORE] = IS_CHECKPOINTED, [SIM_UNLOCK] = IS_LOCKED};
    if (target->checkpoint.is_busy || target->checkpoint.state != needs[call]) return SIM_ILLEGAL_STATE;
    if (fault_call_loses(call)) {
        target->checkpoint.state = IS_FAILED;
        return SIM_FAILED;
    }
    if (!read_word(&target->checkpoint.gate->thread)) return SIM_NOT_SUPPORTED;
    if (call == SIM_PARK && (ledger_has_managed(target) || share_is_holder(target))) return SIM_NOT_SUPPORTED;
    return call == SIM_RESTORE ? restore(target, request) : SIM_OK;
}

bool checkpoint_begin(struct client *caller, const struct sim_request *request, enum sim_status *status,
                      uint32_t *result)
{
    struct client *target = find(caller, request->requested);
    uint32_t call = request->kind;
    *status = !target ? SIM_NO_PROCESS : !caller->is_root || fault_call_fails(call) ? SIM_FAILED : SIM_OK;
    if (*status) return false;
    if (call == SIM_GET_STATE) {
        *result = target->checkpoint.state;
        return false;
    }
    if (call == SIM_GET_THREAD) {
        *result = thread_of(target);
        *status = *result ? SIM_OK : SIM_NOT_SUPPORTED;
        return false;
    }
    *status = refuse(target, request);
    if (*status) return false;
    if (call == SIM_UNLOCK) {
        target->checkpoint.state = IS_RUNNING;
        gate_close(target, false);
        return false;
    }
    if (call == SIM_LOCK) gate_close(target, true);
    target->checkpoint.is_busy = true;
    target->checkpoint.call = call;
    target->checkpoint.caller = caller;
    target->checkpoint.until_ns = request->bytes ? now_ns() + (uint32_t)request->bytes * 1000000ull : 0;
    server.n_busy++;
    give_order(target, call);
    return true;
}

/* Returns whether the call has ended, and its status. */
static bool advance(struct client *target, enum sim_status *status)
{
    struct checkpoint *checkpoint = &target->checkpoint;
    *status = SIM_FAILED;
    if (has_ended(target)) return true;
    if (checkpoint->call == SIM_LOCK) {
        bool is_quiet = has_done_order(target) && !read_word(&checkpoint->gate->n_inside) && !turns_has_work(target);
        *status = is_quiet ? SIM_OK : SIM_NOT_READY;
        if (is_quiet) checkpoint->state = IS_LOCKED;
        if (is_quiet || !checkpoint->until_ns || now_ns() < checkpoint->until_ns) return is_quiet;
        gate_close(target, false);
        return true;
    }
    if (!has_done_order(target)) return false;
    bool has_failed = read_word(&checkpoint->gate->has_failed);
    if (has_failed == (checkpoint->call == SIM_RESTORE)) ledger_park(target);
    if (has_failed) return true;
    checkpoint->state = checkpoint->call == SIM_PARK ? IS_CHECKPOINTED : IS_LOCKED;
    write_word(&checkpoint->gate->is_parked, checkpoint->state == IS_CHECKPOINTED);
    *status = SIM_OK;
    return true;
}

bool checkpoint_step(struct client *target, struct client **caller, enum sim_status *status)
{
    if (!advance(target, status)) return false;
    *caller = target->checkpoint.caller;
    target->checkpoint.is_busy = false;
    target->checkpoint.caller = NULL;
    server.n_busy--;
    return true;
}
