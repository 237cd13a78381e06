/*
 * ledger.c: the memory that the processes of one container hold, in a ledger that they share. Owns nothing; uses no
 * file itself.
 *
 * A charge is one compare-and-swap of its device's last charge (which seat, how many units, its number on that seat).
 * That operation decides. Before the next thread charges, it adds the last charge to the seat that made it, in case the
 * seat's owner was stopped or killed in between. So there is no lock, and at every instant either all of a charge
 * counts or nothing. A seat's number shows whether the last charge was already added to it. Only the owner of a seat
 * releases (any process, if the owner is dead), without a compare-and-swap of the last charge: a release can only make
 * room.
 */
#include "standalone/standalone.h"

#include <stdatomic.h>

#define UNIT 512ULL
#define MOST_AT_ONCE ((1ULL << 31) - 1) /* a TiB; no device has as much */
#define HELD_BITS 39
#define NUMBERS (1u << 25)
#define LOOKS 100

static uint64_t units_of(uint64_t bytes) { return (bytes + UNIT - 1) / UNIT; }

static uint64_t charge_of(unsigned seat, uint32_t number, uint64_t units)
{
    return (uint64_t)number << 39 | (uint64_t)seat << 31 | units;
}
static unsigned seat_of(uint64_t charge) { return charge >> 31 & (FGPU_SEATS - 1); }
static uint64_t charged(uint64_t charge) { return charge & MOST_AT_ONCE; }
static uint32_t charge_number(uint64_t charge) { return (uint32_t)(charge >> 39); }

static uint64_t held_units(uint64_t held) { return held & ((1ULL << HELD_BITS) - 1); }
static uint32_t held_number(uint64_t held) { return (uint32_t)(held >> HELD_BITS); }
static uint32_t after(uint32_t number) { return (number + 1) % NUMBERS; }

/* Add a charge to its seat. A thread that is late finds another number there and does nothing. */
static void enter(struct fgpu_ledger *ledger, unsigned device, uint64_t charge)
{
    _Atomic uint64_t *held = &ledger->held[device][seat_of(charge)];
    uint64_t had = atomic_load(held);
    while (charge && after(held_number(had)) == charge_number(charge)) {
        uint64_t has = (uint64_t)charge_number(charge) << HELD_BITS | (held_units(had) + charged(charge));
        if (atomic_compare_exchange_weak(held, &had, has)) return;
    }
}

static unsigned seats(const struct fgpu_ledger *ledger)
{
    uint64_t n = atomic_load(&ledger->seats);
    return n < FGPU_SEATS ? (unsigned)n : FGPU_SEATS;
}

static uint64_t sum(const struct fgpu_ledger *ledger, unsigned device)
{
    uint64_t units = 0;
    for (unsigned i = 0, n = seats(ledger); i < n; i++) units += held_units(atomic_load(&ledger->held[device][i]));
    return units;
}

/* Charge if it fits. While the last charge is unchanged, the sum can only fall: bytes that do not fit at the end of
 * this read did not fit before. */
bool fgpu_ledger_charge(struct fgpu_ledger *ledger, unsigned device, unsigned seat, uint64_t bytes, uint64_t limit)
{
    uint64_t units = units_of(bytes), most = limit / UNIT;
    _Atomic uint64_t *turn = &ledger->turns[device].last;
    if (bytes > FGPU_MOST_BYTES || units > MOST_AT_ONCE) return false;
    for (;;) {
        uint64_t last = atomic_load(turn);
        enter(ledger, device, last);
        uint32_t number = held_number(atomic_load(&ledger->held[device][seat]));
        uint64_t used = sum(ledger, device);
        if (atomic_load(turn) != last) continue;
        if (used > most || units > most - used) return false;
        uint64_t mine = charge_of(seat, after(number), units);
        if (!atomic_compare_exchange_strong(turn, &last, mine)) continue;
        enter(ledger, device, mine);
        return true;
    }
}

static void lower(_Atomic uint64_t *held, uint64_t units)
{
    uint64_t had = atomic_load(held);
    while (!atomic_compare_exchange_weak(held, &had, had - (units < held_units(had) ? units : held_units(had)))) {
    }
}

void fgpu_ledger_release(struct fgpu_ledger *ledger, unsigned device, unsigned seat, uint64_t bytes)
{
    lower(&ledger->held[device][seat], units_of(bytes));
}

/* Return the sum at one moment; if other processes change it at every attempt, return a sum of several moments. */
uint64_t fgpu_ledger_used(struct fgpu_ledger *ledger, unsigned device)
{
    uint64_t last, units = 0;
    for (int tries = LOOKS; tries--;) {
        last = atomic_load(&ledger->turns[device].last);
        enter(ledger, device, last);
        units = sum(ledger, device);
        if (LIKELY(atomic_load(&ledger->turns[device].last) == last)) break;
    }
    return units * UNIT;
}

uint64_t fgpu_ledger_held(const struct fgpu_ledger *ledger, unsigned device, unsigned seat)
{
    return held_units(atomic_load(&ledger->held[device][seat])) * UNIT;
}

/*
 * Empty the seat of a dead process. Dead processes do not charge, so once the last charge is added, the seat does not
 * grow. Subtract exactly the units that were read before the seat was found to be still that of the dead process. So a
 * thread that was stopped in between cannot empty the seat of the next owner: the first charge of that owner has
 * another number. Free the seat when all devices are empty.
 */
static void vacate(struct fgpu_ledger *ledger, unsigned seat, uint64_t life)
{
    for (unsigned device = 0; device < FGPU_DEVICES; device++) {
        enter(ledger, device, atomic_load(&ledger->turns[device].last));
        _Atomic uint64_t *held = &ledger->held[device][seat];
        uint64_t had = atomic_load(held);
        if (atomic_load(&ledger->lives[seat]) != life) return;
        if (held_units(had)) atomic_compare_exchange_strong(held, &had, had - held_units(had));
    }
    atomic_compare_exchange_strong(&ledger->lives[seat], &life, 0);
}

bool fgpu_ledger_sweep(struct fgpu_ledger *ledger)
{
    bool any = false;
    uint32_t pid;
    for (unsigned i = 0, n = seats(ledger); i < n; i++) {
        uint64_t life = atomic_load(&ledger->lives[i]);
        if (!life || fgpu_liveness_lasts(life, &pid)) continue;
        vacate(ledger, i, life);
        any = true;
    }
    return any;
}

static int take_seat(struct fgpu_ledger *ledger, uint64_t life)
{
    for (unsigned i = 0; i < FGPU_SEATS; i++) {
        uint64_t none = 0, n = atomic_load(&ledger->seats);
        if (!atomic_compare_exchange_strong(&ledger->lives[i], &none, life)) continue;
        while (n <= i && !atomic_compare_exchange_weak(&ledger->seats, &n, i + 1)) {
        }
        return (int)i;
    }
    return -1;
}

int fgpu_ledger_seat(struct fgpu_ledger *ledger, uint64_t life)
{
    fgpu_ledger_sweep(ledger);
    return take_seat(ledger, life);
}

/* Return the index of a device. Of 128 practically random bits, 64 are enough to distinguish sixteen devices. */
int fgpu_ledger_device(struct fgpu_ledger *ledger, const uint8_t uuid[16])
{
    uint64_t name = 0;
    for (int i = 0; i < 16; i++) name = (name ^ uuid[i]) * 0x9e3779b97f4a7c15ULL;
    if (!name) name = 1;
    for (int i = 0; i < FGPU_DEVICES; i++) {
        uint64_t known = 0;
        if (atomic_compare_exchange_strong(&ledger->devices[i], &known, name) || known == name) return i;
    }
    return -1;
}
