/*
 * verdict ROUNDS: makes requests to a kernel that answers with one changed bit, or with none. The shim must accept a
 * word only if all bits of its tag and ticket are right. Exit status 0 if it always did.
 */
#define _GNU_SOURCE
#include "../../../shim/link/verdict.c"

#include <stdio.h>
#include <stdlib.h>

static struct fgpu_control_page control;
static struct fgpu_usage_page usage;
static uint64_t seed = 0x9e3779b97f4a7c15ULL, word;
static unsigned kind_seen, asked;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 2) % below;
}

/* Writes `word` where the request expects its answer, and in the other array a word that would be accepted there. */
void fgpu_admit_here(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket)
{
    uint64_t slot = ticket & (FGPU_VERDICTS - 1), tag = kind & FGPU_TAGGED ? 0 : 77;
    (void)device, (void)bytes;
    kind_seen = kind;
    asked++;
    usage.verdicts[slot] = kind & FGPU_TAGGED ? ticket << 2 | FGPU_ADMITTED : word;
    usage.answers[slot] = tag ? tag << FGPU_TAG_SHIFT | (uint32_t)ticket << 2 | FGPU_ADMITTED : word;
}

static int expected(uint64_t right)
{
    if ((word ^ right) >> 2 || (word & 3) == FGPU_AGAIN) return -1;
    return (int)(word & 3);
}

static int try(unsigned flipped)
{
    struct fgpu_view view = {.control = &control, .usage = &usage};
    uint64_t ticket = draw(1ULL << 62), tag = draw(3) ? 1 + draw(FGPU_TAG_BITS) : 0, verdict = draw(4);
    uint64_t right = (tag ? tag << 34 | (ticket & 0xffffffff) << 2 : ticket << 2) | verdict;
    control.tag = (uint32_t)tag;
    word = flipped < 64 ? right ^ 1ULL << flipped : right;
    asked = 0;
    int got = fgpu_ask(view, 0, 0, FGPU_POOL | FGPU_PATIENT, ticket);
    bool kind_is_right = kind_seen == (FGPU_POOL | FGPU_PATIENT | (tag ? FGPU_TAGGED : 0));
    if (got == expected(right) && kind_is_right && asked == (got < 0 ? 64 : 1)) return 0;
    printf("bit %u of %llx: %d, asked %u times of kind %x\n", flipped, (unsigned long long)right, got, asked,
           kind_seen);
    return 1;
}

int main(int count, char **words)
{
    int rounds = count > 1 ? atoi(words[1]) : 1, wrong = 0;
    for (int i = 0; i < rounds; i++)
        for (unsigned flipped = 0; flipped <= 64; flipped++) wrong += try(flipped);
    return wrong > 0;
}
