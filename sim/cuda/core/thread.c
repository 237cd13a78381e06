/* Each thread's stack of contexts. The top of the stack is the current context. */
#include "cuda/core/driver.h"

#define MAX_STACK 128

static __thread struct context *stack[MAX_STACK];
static __thread unsigned depth;

struct context *context_current(void) { return depth ? stack[depth - 1] : NULL; }

bool thread_is_full(void) { return depth == MAX_STACK; }

void thread_push(struct context *context) { stack[depth++] = context; }

struct context *thread_pop(void) { return depth ? stack[--depth] : NULL; }
