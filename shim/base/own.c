/*
 * own.c: the state of this process that a forked child must not inherit. Owns the page; at the request of link.c, the
 * kernel wipes the page at a fork.
 */
#include "base/own.h"

union fgpu_own_page fgpu_own_page __attribute__((aligned(FGPU_PAGE_BYTES)));
