/*
 * exports.c: writes hooks into the symbol table of a loaded library, in place of the functions that they hook. Owns
 * nothing.
 *
 * Some lookups never reach the shim's exports: those of a file that was opened with RTLD_DEEPBIND, by relocation or by
 * the C library's own dlsym, and RTLD_NEXT in a wrapper that was opened later. They end at the driver's table, so the
 * hooks must be there.
 *
 * The changed pages are prepared elsewhere and then moved into place in one step. There is no lock that a thread could
 * hold when it exits, and no page is writable while another thread looks up a name in it. Two threads that do this at
 * the same time write the same contents.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/symbols.h"

struct table {
    ElfW(Sym) * symbols;
    const char *names, *names_end;
    size_t count;
};

/* A table of this kind has no length: the last chain of the last bucket ends with the last symbol. */
static size_t count_by_gnu_hash(const uint32_t *hash)
{
    const uint32_t *bucket = hash + 4 + hash[2] * (sizeof(ElfW(Addr)) / sizeof *hash), *chain = bucket + hash[0];
    uint32_t first = hash[1], last = 0;
    for (; bucket < chain; bucket++)
        if (*bucket > last) last = *bucket;
    if (last < first) return 0;
    while (!(chain[last - first] & 1)) last++;
    return last + 1;
}

static struct table table_of(const struct link_map *map)
{
    struct table table = {0};
    size_t names_bytes = 0;
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++) {
        ElfW(Addr) value = entry->d_un.d_ptr;
        char *at = (char *)(value < map->l_addr ? value + map->l_addr : value); /* normally relocated by glibc */
        if (entry->d_tag == DT_SYMTAB) table.symbols = (void *)at;
        if (entry->d_tag == DT_STRTAB) table.names = at;
        if (entry->d_tag == DT_STRSZ) names_bytes = value;
        if (entry->d_tag == DT_HASH) table.count = ((const uint32_t *)(void *)at)[1];
        if (entry->d_tag == DT_GNU_HASH && !table.count) table.count = count_by_gnu_hash((const void *)at);
    }
    table.names_end = table.names + names_bytes;
    return table;
}

/* The shim's names by a part of each. A library has hundreds of symbols, so each is compared with few names. */
struct index {
    uint8_t first[256], next[FGPU_NAMES]; /* 1 + a name; 0: none */
};
_Static_assert(FGPU_NAMES < UINT8_MAX, "a name fits into a byte");

static uint8_t *first_of(struct index *index, const char *name, size_t length)
{
    return &index->first[(8 * length + (unsigned char)name[length / 2]) % 256];
}

static void make(struct index *index)
{
    memset(index, 0, sizeof *index);
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++) {
        uint8_t *first = first_of(index, fgpu_name_of(at), fgpu_symbols[at].length);
        index->next[at] = *first;
        *first = (uint8_t)(at + 1);
    }
}

static enum fgpu_name find(struct index *index, const char *name)
{
    unsigned next = *first_of(index, name, strlen(name));
    while (next && strcmp(fgpu_name_of((enum fgpu_name)(next - 1)), name)) next = index->next[next - 1];
    return next ? (enum fgpu_name)(next - 1) : FGPU_NAMES;
}

/* Return whether these pages contain no code, which could not be executed afterwards. They are in a segment without
 * code, or end within the names, which linkers put between the symbols and the code. */
static bool is_without_code(const struct table *table, const char *begin, size_t bytes)
{
    const char *path;
    if (begin < table->names && begin + bytes <= table->names_end) return true;
    const ElfW(Ehdr) *header = fgpu_base_of(begin, &path);
    if (!header || header->e_phentsize != sizeof(ElfW(Phdr))) return false;
    const ElfW(Phdr) *part = (const void *)((const char *)header + header->e_phoff);
    for (unsigned i = 0; i < header->e_phnum; i++, part++)
        if (part->p_type == PT_LOAD && (size_t)((const char *)table->symbols - (const char *)header) < part->p_memsz)
            return !(part->p_flags & PF_X); /* the first segment, with the header */
    return false;
}

/*
 * Store the addresses of all names of the library, then write the hooks into its table. Return whether they were
 * written. The addresses are stored first, so that a hook that is found in the table has a function to call.
 */
static bool replace_exports(void *library, enum fgpu_name of, const int32_t hooks[])
{
    const struct link_map *map = library; /* with glibc, a handle is a struct link_map */
    struct table table = table_of(map);
    struct index index;
    bool seen[FGPU_NAMES] = {false};
    char *begin = (char *)((uintptr_t)table.symbols & -(uintptr_t)FGPU_PAGE_BYTES);
    size_t bytes =
        ((uintptr_t)(table.symbols + table.count) - (uintptr_t)begin + FGPU_PAGE_BYTES - 1) & -(size_t)FGPU_PAGE_BYTES;
    char *copy = MAP_FAILED;
    ElfW(Sym) *changed = NULL;
    if (is_without_code(&table, begin, bytes))
        copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy != MAP_FAILED) changed = memcpy(copy, begin, bytes) + ((char *)table.symbols - begin);
    make(&index);
    for (size_t i = 1; i < table.count; i++) {
        ElfW(Addr) offset = table.symbols[i].st_value;
        enum fgpu_name at = find(&index, table.names + table.symbols[i].st_name);
        if (!offset || at == FGPU_NAMES) continue;
        ElfW(Addr) hook = (ElfW(Addr))fgpu_hook(hooks, at) - map->l_addr;
        seen[at] = true;
        if (offset != hook) fgpu_keep(at, (void *)(map->l_addr + offset)); /* else another thread has stored it */
        if (hooks[at] && changed) changed[i].st_value = hook;
    }
    /* Delete the addresses of functions that this library lacks: they are those of an unloaded library. */
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++)
        if (!seen[at] && fgpu_symbols[at].library == fgpu_symbols[of].library) fgpu_keep(at, NULL);
    if (!changed) return false;
    if (!syscall(SYS_mprotect, copy, bytes, PROT_READ) &&
        syscall(SYS_mremap, copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, begin) != -1)
        return true;
    munmap(copy, bytes);
    return false;
}

/*
 * Find the function again: a library that was unloaded and loaded again has another address. A library that is found
 * for the first time gets the hooks in place of its exports. From then on a lookup in it finds the hook, and the
 * driver's own address is the stored one.
 */
void *fgpu_find_anew(enum fgpu_name at, const int32_t hooks[])
{
    static _Atomic bool cannot;
    void *library = fgpu_open_loaded(fgpu_file_of(at));
    if (!library) return NULL;
    void *found = fgpu_symbol(library, at);
    if (found && found == fgpu_hook(hooks, at))
        found = fgpu_kept(at);
    else if (found && (found != fgpu_kept(at) || !atomic_load(&cannot)) && !replace_exports(library, at, hooks))
        atomic_store(&cannot, true);
    fgpu_close(library);
    return found;
}

/*
 * Load the library of this name permanently, if it exists: the program is about to open a file whose lookups do not
 * reach the shim. If that file is the library itself, in any folder, do not load it: the program must get the file that
 * it opens.
 */
void fgpu_load_for_good(enum fgpu_name at, const char *opened, const int32_t hooks[])
{
    static _Atomic enum state { UNKNOWN, ABSENT, LOADED } states[FGPU_LIBRARIES];
    _Atomic enum state *state = &states[fgpu_symbols[at].library];
    const char *file = fgpu_file_of(at), *base = opened;
    if (atomic_load(state) == LOADED) return;
    for (; *opened; opened++)
        if (*opened == '/') base = opened + 1;
    bool itself = !strncmp(base, file, strlen(file) - 2); /* without the version */
    void *library = fgpu_real_dlopen(file, RTLD_LAZY | (itself || atomic_load(state) == ABSENT ? RTLD_NOLOAD : 0));
    if (library) fgpu_find_anew(at, hooks);
    if (library || !itself) atomic_store(state, library ? LOADED : ABSENT);
}
