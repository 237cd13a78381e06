/* image SEED ROUNDS FILE...: reads the sizes in files of code, unchanged and with changed or missing bytes, each in
 * memory whose end is the end of the image. For sanitizers. Prints the result of each unchanged file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../shim/code/image.c"

static uint64_t state;
static uint64_t draw(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? (state >> 11) % below : 0;
}

static void try(const char *file, size_t size)
{
    size_t cut = draw(4) ? size : draw(size + 1);
    char *image = malloc(cut ? cut : 1);
    memcpy(image, file, cut);
    for (uint64_t n = draw(8); cut && n; n--) image[draw(cut)] ^= draw(2) ? 0xff : 1u << draw(8);
    if ((fgpu_image_data(image, cut) & ~FGPU_USES_HEAP) > FGPU_MOST_BYTES) abort();
    free(image);
}

int main(int argc, char **argv)
{
    state = strtoull(argv[1], NULL, 0) * 2 + 1;
    for (int i = 3; i < argc; i++) {
        FILE *from = fopen(argv[i], "rb");
        static char file[1 << 16];
        size_t size = from ? fread(file, 1, sizeof file, from) : 0;
        if (from) fclose(from);
        printf("%llu\n", (unsigned long long)fgpu_image_data(file, size));
        for (int n = atoi(argv[2]); n; n--) try(file, size);
    }
    return 0;
}
