/*
 * books.c: what the processes of one container hold, in memory that they share. Owns nothing; knows no file.
 *
 * A charge is one compare-and-swap of its device's last charge (which seat, how much, its number there): that decides,
 * and whoever comes next enters it at that seat first, should its owner have been stopped or killed in between. So
 * there is no lock, and at every instant either all of a charge counts or nothing. A seat's number tells whether the
 * last charge is in it already. A release is the owner's alone and needs no turn: it can only make more room.
 */
#include "books.h"

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

/* Whoever is late finds another number there. */
static void enter(struct fgpu_books *books, unsigned device, uint64_t charge)
{
    _Atomic uint64_t *held = &books->held[device][seat_of(charge)];
    uint64_t had = atomic_load(held);
    while (charge && after(held_number(had)) == charge_number(charge)) {
        uint64_t has = (uint64_t)charge_number(charge) << HELD_BITS | (held_units(had) + charged(charge));
        if (atomic_compare_exchange_weak(held, &had, has)) return;
    }
}

static unsigned seats(const struct fgpu_books *books)
{
    uint64_t n = atomic_load(&books->seats);
    return n < FGPU_SEATS ? (unsigned)n : FGPU_SEATS;
}

static uint64_t sum(const struct fgpu_books *books, unsigned device)
{
    uint64_t units = 0;
    for (unsigned i = 0, n = seats(books); i < n; i++) units += held_units(atomic_load(&books->held[device][i]));
    return units;
}

/* As long as the last charge stays the last one the sum can only fall: what does not fit then did not fit before. */
bool fgpu_books_charge(struct fgpu_books *books, unsigned device, unsigned seat, uint64_t bytes, uint64_t limit)
{
    uint64_t units = units_of(bytes), most = limit / UNIT;
    _Atomic uint64_t *turn = &books->turns[device].last;
    if (bytes > FGPU_MOST_BYTES || units > MOST_AT_ONCE) return false;
    for (;;) {
        uint64_t last = atomic_load(turn);
        enter(books, device, last);
        uint32_t number = held_number(atomic_load(&books->held[device][seat]));
        uint64_t used = sum(books, device);
        if (atomic_load(turn) != last) continue;
        if (used > most || units > most - used) return false;
        uint64_t mine = charge_of(seat, after(number), units);
        if (!atomic_compare_exchange_strong(turn, &last, mine)) continue;
        enter(books, device, mine);
        return true;
    }
}

static void lower(_Atomic uint64_t *held, uint64_t units)
{
    uint64_t had = atomic_load(held);
    while (!atomic_compare_exchange_weak(held, &had, had - (units < held_units(had) ? units : held_units(had)))) {
    }
}

void fgpu_books_release(struct fgpu_books *books, unsigned device, unsigned seat, uint64_t bytes)
{
    lower(&books->held[device][seat], units_of(bytes));
}

/* Of one moment, unless others never let it come to that. */
uint64_t fgpu_books_used(struct fgpu_books *books, unsigned device)
{
    uint64_t last, units = 0;
    for (int tries = LOOKS; tries--;) {
        last = atomic_load(&books->turns[device].last);
        enter(books, device, last);
        units = sum(books, device);
        if (LIKELY(atomic_load(&books->turns[device].last) == last)) break;
    }
    return units * UNIT;
}

uint64_t fgpu_books_held(const struct fgpu_books *books, unsigned device, unsigned seat)
{
    return held_units(atomic_load(&books->held[device][seat])) * UNIT;
}

/*
 * The dead charge nothing any more, so once the last charge is entered their seat only waits to be emptied. Emptied is
 * exactly what was seen there before the seat was seen to be theirs still: a sweeper that was stopped meanwhile cannot
 * empty it for the next owner, whose first charge has another number. The seat is free when all of it is.
 */
static void vacate(struct fgpu_books *books, unsigned seat, uint64_t life)
{
    for (unsigned device = 0; device < FGPU_DEVICES; device++) {
        enter(books, device, atomic_load(&books->turns[device].last));
        _Atomic uint64_t *held = &books->held[device][seat];
        uint64_t had = atomic_load(held);
        if (atomic_load(&books->lives[seat]) != life) return;
        if (held_units(had)) atomic_compare_exchange_strong(held, &had, had - held_units(had));
    }
    atomic_compare_exchange_strong(&books->lives[seat], &life, 0);
}

bool fgpu_books_sweep(struct fgpu_books *books)
{
    bool any = false;
    uint32_t pid;
    for (unsigned i = 0, n = seats(books); i < n; i++) {
        uint64_t life = atomic_load(&books->lives[i]);
        if (!life || fgpu_life_lasts(life, &pid)) continue;
        vacate(books, i, life);
        any = true;
    }
    return any;
}

static int take_seat(struct fgpu_books *books, uint64_t life)
{
    for (unsigned i = 0; i < FGPU_SEATS; i++) {
        uint64_t nobody = 0, n = atomic_load(&books->seats);
        if (!atomic_compare_exchange_strong(&books->lives[i], &nobody, life)) continue;
        while (n <= i && !atomic_compare_exchange_weak(&books->seats, &n, i + 1)) {
        }
        return (int)i;
    }
    return -1;
}

int fgpu_books_seat(struct fgpu_books *books, uint64_t life)
{
    fgpu_books_sweep(books);
    return take_seat(books, life);
}

/* Of 128 bits that are as good as random, 64 are enough to tell sixteen devices apart. */
int fgpu_books_device(struct fgpu_books *books, const uint8_t uuid[16])
{
    uint64_t name = 0;
    for (int i = 0; i < 16; i++) name = (name ^ uuid[i]) * 0x9e3779b97f4a7c15ULL;
    if (!name) name = 1;
    for (int i = 0; i < FGPU_DEVICES; i++) {
        uint64_t known = 0;
        if (atomic_compare_exchange_strong(&books->devices[i], &known, name) || known == name) return i;
    }
    return -1;
}
