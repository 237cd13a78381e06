/*
 * ledger: tests the standalone ledger by itself, in memory that forked processes share. `ledger races N`,
 * `ledger churn OPERATIONS`, `ledger fits N`, `ledger kills N`, `ledger left N`. Each prints its counts. The exit
 * status is 0 only if the ledger was right at every check.
 *
 * `real` has the bytes that are certainly charged: it is raised after a charge and lowered before the release. It must
 * never exceed the limit, for any number of processes, and wherever one of them is stopped or killed.
 */
#define _GNU_SOURCE
#include "../../../shim/standalone/ledger.c"
#include "../../../shim/standalone/liveness.c"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1ULL << 20)
#define LIMIT (64 * MIB)
#define WORKERS 6

struct shared {
    union {
        struct fgpu_ledger ledger;
        char pages[FGPU_LEDGER_BYTES];
    };
    _Atomic uint64_t real, beyond, winners, refused, operations;
    _Atomic uint32_t round, arrived;
    _Atomic uint64_t held[WORKERS]; /* churn: each worker's bytes after its last operation; fits: [0] has the tokens */
};
static struct shared *all;
static uint64_t seed;

uint64_t fgpu_ticket(void)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed;
}
static uint64_t draw(uint64_t below) { return (fgpu_ticket() >> 11) % below; }

static int sit(unsigned number)
{
    seed = ((uint64_t)getpid() << 20 | number) * 0x9e3779b97f4a7c15ULL;
    int seat = fgpu_ledger_seat(&all->ledger, fgpu_liveness_begin());
    if (seat < 0) exit(3);
    return seat;
}

static bool charge(int seat, uint64_t bytes)
{
    if (!fgpu_ledger_charge(&all->ledger, 0, (unsigned)seat, bytes, LIMIT) &&
        !(fgpu_ledger_sweep(&all->ledger) && fgpu_ledger_charge(&all->ledger, 0, (unsigned)seat, bytes, LIMIT)))
        return false;
    if (atomic_fetch_add(&all->real, bytes) + bytes > LIMIT) all->beyond++;
    return true;
}

static void release(int seat, uint64_t bytes)
{
    atomic_fetch_sub(&all->real, bytes);
    fgpu_ledger_release(&all->ledger, 0, (unsigned)seat, bytes);
}

static uint64_t used(void) { return fgpu_ledger_used(&all->ledger, 0); }

/* -- races: in each round, all workers request the same last piece */

static void racer(unsigned number, uint32_t rounds)
{
    int seat = sit(number);
    for (uint32_t round = 1; round <= rounds; round++) {
        all->arrived++;
        while (all->round < round) sched_yield();
        bool won = charge(seat, LIMIT - MIB);
        all->winners += won;
        all->arrived++;
        while (all->arrived < round * 3 * WORKERS - WORKERS) sched_yield();
        if (won) release(seat, LIMIT - MIB);
        all->arrived++;
    }
}

static int races(uint32_t rounds)
{
    uint64_t wrong = 0;
    for (unsigned i = 0; i < WORKERS; i++)
        if (!fork()) racer(i, rounds), _exit(0);
    for (uint32_t round = 1; round <= rounds; round++) {
        while (all->arrived < (round - 1) * 3 * WORKERS + WORKERS) sched_yield();
        all->winners = 0;
        all->round = round;
        while (all->arrived < round * 3 * WORKERS - WORKERS) sched_yield();
        wrong += all->winners != 1;
    }
    while (wait(NULL) > 0) {
    }
    printf("%u races, %llu without exactly one winner, %llu bytes left\n", rounds, (unsigned long long)wrong,
           (unsigned long long)used());
    return wrong || used() || all->beyond;
}

/* -- churn: random operations, and a check whenever all workers have stopped */

#define PIECES 32

static void live(unsigned number, uint64_t operations)
{
    uint64_t pieces[PIECES] = {0}, held = 0;
    int seat = sit(number);
    for (uint64_t i = 0; i < operations; i++) {
        uint64_t *piece = &pieces[draw(PIECES)];
        uint64_t bytes = 512 * (1 + draw(1 << draw(16)));
        all->operations++;
        if (*piece) {
            release(seat, *piece);
            held -= *piece;
            *piece = 0;
        } else if (charge(seat, bytes)) {
            *piece = bytes;
            held += bytes;
        } else {
            all->refused++;
        }
    }
    all->held[number] = held;
    all->arrived++;
    while (all->round) pause();
}

static int churn(uint64_t operations)
{
    uint64_t wrong = 0, looks = 0;
    for (uint64_t done = 0; done < operations; done += WORKERS * 10000) {
        pid_t workers[WORKERS];
        all->arrived = 0;
        all->round = 1;
        for (unsigned i = 0; i < WORKERS; i++)
            if (!(workers[i] = fork())) live(i, 10000), _exit(0);
        while (all->arrived < WORKERS) poll(NULL, 0, 1);
        uint64_t sum = 0;
        for (unsigned i = 0; i < WORKERS; i++) sum += all->held[i];
        wrong += used() != sum || all->real != sum;
        for (unsigned i = 0; i < WORKERS; i++) kill(workers[i], SIGKILL);
        while (wait(NULL) > 0) {
        }
        fgpu_ledger_sweep(&all->ledger);
        all->real = 0;
        wrong += used() != 0;
        looks++;
    }
    printf("%llu operations, %llu refused, %llu beyond, %llu of %llu looks wrong\n",
           (unsigned long long)all->operations, (unsigned long long)all->refused, (unsigned long long)all->beyond,
           (unsigned long long)wrong, (unsigned long long)looks);
    return wrong || all->beyond || !all->refused;
}

/* -- fits: a request that fits is never refused. A worker makes a request only while it holds one of TOKENS tokens. */

#define TOKENS 4

static void pass_on(unsigned number, unsigned turns)
{
    int seat = sit(number);
    for (unsigned i = 0; i < turns; i++) {
        uint64_t had = all->held[0];
        while (!had || !atomic_compare_exchange_weak(&all->held[0], &had, had - 1)) {
            sched_yield();
            had = all->held[0];
        }
        if (fgpu_ledger_charge(&all->ledger, 0, (unsigned)seat, LIMIT / TOKENS, LIMIT))
            fgpu_ledger_release(&all->ledger, 0, (unsigned)seat, LIMIT / TOKENS);
        else
            all->refused++;
        all->held[0]++;
    }
}

static int fits(unsigned turns)
{
    all->held[0] = TOKENS;
    for (unsigned i = 0; i < WORKERS; i++)
        if (!fork()) pass_on(i, turns / WORKERS), _exit(0);
    while (wait(NULL) > 0) {
    }
    printf("%u turns, %llu refused, %llu bytes left\n", turns, (unsigned long long)all->refused,
           (unsigned long long)used());
    return all->refused || used();
}

/* -- left: a process that died between its charge and its entry, and a sweeper that is late for a reused seat */

static int left(unsigned rounds)
{
    uint64_t wrong = 0, nobody = 1ULL << 63 | 0x7ffffffeULL << 32;
    int mine = sit(0);
    for (unsigned i = 0; i < rounds; i++) {
        int seat = fgpu_ledger_seat(&all->ledger, nobody); /* the seat of an exited process */
        charge(mine, MIB);
        uint32_t number = held_number(all->ledger.held[0][seat]);
        all->ledger.turns[0].last = charge_of((unsigned)seat, after(number), units_of(3 * MIB));
        wrong += !charge(mine, MIB) || used() != 5 * MIB;
        all->ledger.turns[0].last = charge_of((unsigned)seat, after(after(number)), units_of(4 * MIB));
        wrong += !fgpu_ledger_sweep(&all->ledger) || used() != 2 * MIB;
        wrong += !charge(mine, MIB) || used() != 3 * MIB;
        wrong += fgpu_ledger_seat(&all->ledger, nobody + 1) != seat || !charge(seat, MIB);
        vacate(&all->ledger, (unsigned)seat, nobody);
        wrong += used() != 4 * MIB;
        fgpu_ledger_sweep(&all->ledger);
        release(mine, 3 * MIB);
        all->real = 0;
        wrong += used() != 0;
    }
    printf("%u rounds, %llu wrong\n", rounds, (unsigned long long)wrong);
    return wrong != 0;
}

/* -- kills: workers are killed and stopped at any instruction, while the others continue */

static void restless(unsigned number)
{
    int seat = sit(number);
    for (;;) {
        uint64_t bytes = 512 * (1 + draw(1 << 14));
        all->operations++;
        if (!fgpu_ledger_charge(&all->ledger, 0, (unsigned)seat, bytes, LIMIT)) {
            if (fgpu_ledger_used(&all->ledger, 0) > LIMIT) all->beyond++;
            fgpu_ledger_sweep(&all->ledger);
            if (!draw(4)) fgpu_ledger_release(&all->ledger, 0, (unsigned)seat, LIMIT); /* all that it has */
        }
    }
}

static int kills(unsigned count)
{
    pid_t workers[WORKERS] = {0};
    unsigned stalled = 0;
    srand(7);
    for (unsigned n = 0; n < count; n++) {
        unsigned i = (unsigned)rand() % WORKERS;
        if (workers[i]) {
            kill(workers[i], SIGKILL);
            waitpid(workers[i], NULL, 0);
        }
        if (!(workers[i] = fork())) restless(i), _exit(0);
        pid_t stopped = workers[(i + 1) % WORKERS];
        if (stopped) kill(stopped, SIGSTOP);
        uint64_t before = all->operations;
        unsigned waited = 0;
        while (all->operations < before + 100 && waited++ < 5000) poll(NULL, 0, 1);
        stalled += waited >= 5000;
        usleep((unsigned)rand() % 1000);
        if (stopped) kill(stopped, SIGCONT);
    }
    for (unsigned i = 0; i < WORKERS; i++)
        if (workers[i]) kill(workers[i], SIGKILL);
    while (wait(NULL) > 0) {
    }
    fgpu_ledger_sweep(&all->ledger);
    uint64_t left = used();
    unsigned seats_left = 0;
    for (unsigned i = 0; i < FGPU_SEATS; i++) seats_left += all->ledger.lives[i] != 0;
    printf("%u kills, %llu operations, %u stalled, %llu beyond, %llu bytes and %u seats left\n", count,
           (unsigned long long)all->operations, stalled, (unsigned long long)all->beyond, (unsigned long long)left,
           seats_left);
    return stalled || all->beyond || left || seats_left;
}

int main(int count, char **arguments)
{
    if (count != 3) return 2;
    all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned n = (unsigned)atoi(arguments[2]);
    if (!strcmp(arguments[1], "races")) return races(n);
    if (!strcmp(arguments[1], "churn")) return churn(n);
    if (!strcmp(arguments[1], "fits")) return fits(n);
    if (!strcmp(arguments[1], "left")) return left(n);
    return kills(n);
}
