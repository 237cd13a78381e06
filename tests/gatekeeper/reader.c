/*
 * reader PAGE READS STATES: reads the rows of a control page as a shim does, while another process writes them. It
 * makes at least READS reads, and stops when it has read STATES different states. All rows of one state have the same
 * number of bytes, which only grows. Prints the number of torn reads, of reads without rows, of states, and of reads
 * that were begun again.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fgpu.h"

#define ROWS 4

static const struct fgpu_control_page *page;
static unsigned long again;

static unsigned read_rows(struct fgpu_row *rows)
{
    for (;; again++) {
        __u32 before = __atomic_load_n(&page->sequence, __ATOMIC_ACQUIRE);
        if (before & 1) continue;
        unsigned count = __atomic_load_n(&page->row_count, __ATOMIC_RELAXED);
        memcpy(rows, (const void *)page->rows, ROWS * sizeof *rows);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&page->sequence, __ATOMIC_RELAXED) == before) return count;
    }
}

int main(int argc, char **argv)
{
    struct fgpu_row rows[ROWS];
    unsigned long torn = 0, empty = 0, states = 0, last = 0;
    if (argc != 4) return 2;
    page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, atoi(argv[1]), 0);
    if (page == MAP_FAILED) return 3;
    unsigned long wanted = strtoul(argv[3], NULL, 10);
    for (long left = atol(argv[2]); left > 0 || states < wanted; left--) {
        unsigned count = read_rows(rows);
        unsigned long bytes = rows[0].bytes;
        empty += count != ROWS || !bytes;
        for (int i = 1; i < ROWS; i++) torn += rows[i].bytes != bytes;
        torn += bytes < last;
        states += bytes != last;
        last = bytes;
    }
    printf("%lu %lu %lu %lu\n", torn, empty, states, again);
    return 0;
}
