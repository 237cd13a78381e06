/*
 * parking.bpf.h: bytes of parked processes. The driver has copied the memory of such a process to the host, and the
 * device holds no memory of the process.
 *
 * The process's own level stays charged, so its room is kept, and views from inside do not change. The levels around
 * the own level are not charged. Therefore only these outer levels have to admit the bytes when the process is woken.
 * The levels of a process with an entry do not change. The shim of the process reads from the page of its own level
 * that calls have to be delayed.
 */

static struct fgpu_parked *parked_entry(u32 tgid, u64 generation)
{
    struct fgpu_parked_key key = {.tgid = tgid, .generation = generation};
    return parked.lookup(&key);
}

static void hold(const struct fgpu_level *level, u64 processes)
{
    struct fgpu_usage_page *page = level->cgroup ? page_at(level) : 0;
    if (page) __sync_fetch_and_add(&page->held, processes);
}

/* Create the entry of a process that the agent is about to park. From now on no reading of NVML corrects the charge of
 * this process. */
static int begin_park(struct fgpu_process *p, u32 tgid)
{
    struct fgpu_parked_key key = {.tgid = tgid, .generation = p->generation};
    struct fgpu_parked fresh = {.since_ns = bpf_ktime_get_ns(), .level = *levels_of(p, *(volatile u64 *)&p->turn)};
    if (parked.insert(&key, &fresh)) return parked.lookup(&key) ? 0 : -7;
    hold(&fresh.level, 1);
    begin(p);
    note(p, FGPU_PARKED);
    end(p);
    return 0;
}

/* Subtract bytes from the levels around the own level of the process. */
static void leave_groups(struct fgpu_process *p, u64 side, u32 device, u64 bytes)
{
    struct fgpu_level *levels = levels_of(p, side);
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = i && levels[i].cgroup ? page_at(&levels[i]) : 0;
        if (page) subtract(&page->devices[slot(device)].used, bytes);
    }
}

/* Record that the driver has released the process's memory on a device. The function may be called again to move bytes
 * that were charged after the last call. */
static int park(struct fgpu_process *p, u32 tgid, u32 device)
{
    struct fgpu_parked *entry = parked_entry(tgid, p->generation);
    u64 side = *(volatile u64 *)&p->turn;
    device &= DEVICE_MASK;
    s64 bytes = *(volatile s64 *)charged(p, side, device);
    if (!entry) return -2;
    if (bytes <= 0) return 0;
    if (__sync_val_compare_and_swap((u64 *)charged(p, side, device), bytes, 0) != bytes) return -11;
    begin(p);
    entry->level = *levels_of(p, side);
    __sync_fetch_and_add(&entry->bytes[slot(device)], bytes);
    struct fgpu_usage_page *own = page_at(&entry->level);
    if (own) __sync_fetch_and_add(&own->parked[slot(device)], bytes);
    leave_groups(p, side, device, bytes);
    end(p);
    return 0;
}

/* Charge the parked bytes on a device again, before the driver restores these bytes. `force`: the driver has restored
 * the bytes already. */
static int wake(struct fgpu_process *p, u32 tgid, u32 device, int force)
{
    struct fgpu_parked *entry = parked_entry(tgid, p->generation);
    struct held h;
    device &= DEVICE_MASK;
    if (!entry) return -2;
    u64 bytes = *(volatile u64 *)&entry->bytes[slot(device)];
    if (!bytes) return 0;
    look_up(p, &h);
    h.page[0] = 0;
    if (take_levels(&h, device, bytes, force) == FGPU_AGAIN) return -28;
    if (__sync_val_compare_and_swap(&entry->bytes[slot(device)], bytes, 0) != bytes) {
        give_back_levels(&h, device, bytes, FGPU_LEVELS);
        return -11;
    }
    begin(p);
    __sync_fetch_and_add(charged(p, h.side, device), bytes);
    struct fgpu_usage_page *own = page_at(&entry->level);
    if (own) subtract(&own->parked[slot(device)], bytes);
    end(p);
    return 0;
}

/* Handle the exit of a parked process. Its parked bytes are on no device, so these bytes are released at once. */
static void drop_parked(struct fgpu_process *p, u32 tgid)
{
    struct fgpu_parked_key key = {.tgid = tgid, .generation = p->generation};
    struct fgpu_parked *entry = parked.lookup(&key);
    if (!entry) return;
    struct fgpu_usage_page *own = entry->level.cgroup ? page_at(&entry->level) : 0;
    for (u32 d = 0; d < FGPU_DEVICES; d++) {
        u64 bytes = __sync_lock_test_and_set(&entry->bytes[d], 0);
        if (!own) continue;
        subtract(&own->parked[d], bytes);
        subtract(&own->devices[d].used, bytes);
    }
    struct fgpu_level level = entry->level;
    if (!parked.delete(&key)) hold(&level, -1ull);
}

/* Delete the entry of a process that runs again. */
static int end_park(u32 tgid, u64 generation)
{
    struct fgpu_parked_key key = {.tgid = tgid, .generation = generation};
    struct fgpu_parked *entry = parked.lookup(&key);
    struct fgpu_process *p = processes.lookup(&tgid);
    if (!entry) return -2;
    u64 left = 0;
    for (u32 d = 0; d < FGPU_DEVICES; d++) left |= *(volatile u64 *)&entry->bytes[d];
    if (left) return -16;
    if (p && p->generation == generation) {
        begin(p);
        __sync_fetch_and_and((u64 *)&p->level_count, ~((u64)FGPU_PARKED << 32));
        end(p);
    }
    struct fgpu_level level = entry->level;
    if (!parked.delete(&key)) hold(&level, -1ull);
    return 0;
}
