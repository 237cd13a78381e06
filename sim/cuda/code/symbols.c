/* Lists of the names in an image. */
#include "cuda/code/code.h"

#include <stdlib.h>
#include <string.h>

bool symbol_new(struct symbol **list, const char *name, size_t length, uint64_t size, uint64_t offset)
{
    struct symbol *symbol = calloc(1, sizeof *symbol + length + 1);
    if (!symbol) return false;
    memcpy(symbol->name, name, length);
    symbol->size = size;
    symbol->offset = offset;
    symbol->next = *list;
    *list = symbol;
    return true;
}

const struct symbol *symbol_find(const struct symbol *list, const char *name)
{
    while (list && strcmp(list->name, name)) list = list->next;
    return list;
}

void symbols_free(struct symbol *list)
{
    for (struct symbol *next; list; list = next) {
        next = list->next;
        free(list);
    }
}
