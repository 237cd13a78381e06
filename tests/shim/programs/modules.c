/* Loads a plugin in the way in which libc loads its own modules. Before glibc 2.34, no libdl is in the process then. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#if __GLIBC_PREREQ(2, 34)
#define open_module(path) dlopen(path, RTLD_NOW)
#define find_in dlsym
#else
extern void *__libc_dlopen_mode(const char *, int), *__libc_dlsym(void *, const char *);
#define open_module(path) __libc_dlopen_mode(path, (int)(RTLD_NOW | 0x80000000))
#define find_in __libc_dlsym
#endif

int main(int count, char **words)
{
    void *module = count > 1 ? open_module(words[1]) : NULL;
    int (*allocate)(size_t) = module ? find_in(module, "plugin_alloc") : NULL;
    for (int i = 0; allocate && i < 2; i++) printf("%d ", allocate(600 << 20));
    puts(module ? "loaded" : "nothing loaded");
    return 0;
}
