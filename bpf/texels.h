/* texels.h: the size of a texel (an element of an array) by CUarray_format, for the shim and for the BPF programs. */
#pragma once

/* Return the bits of a texel. Compressed and planar formats have a fixed number of channels, and their size is the mean
 * over a block of texels. A format that is not known counts as the smallest known texel: a free releases the recorded
 * bytes, which must not exceed the driver's, and NVML shows the rest. */
static inline unsigned fgpu_texel_bits(unsigned format, unsigned channels)
{
    switch (format) {
    case 0x01: /* UNSIGNED_INT8 */
    case 0x08: /* SIGNED_INT8 */
        return 8 * channels;
    case 0x02: /* UNSIGNED_INT16 */
    case 0x09: /* SIGNED_INT16 */
    case 0x10: /* HALF */
        return 16 * channels;
    case 0x03: /* UNSIGNED_INT32 */
    case 0x0a: /* SIGNED_INT32 */
    case 0x20: /* FLOAT */
        return 32 * channels;
    case 0x93 ... 0x96: /* BC2, BC3 */
    case 0x99 ... 0x9e: /* BC5, BC6H, BC7 */
    case 0xc0:          /* UNORM_INT8X1 */
    case 0xc6:          /* SNORM_INT8X1 */
        return 8;
    case 0x53: /* UINT8_SEMIPLANAR_420 */
    case 0x59: /* UINT8_PLANAR_420 */
    case 0xb0: /* NV12 */
        return 12;
    case 0x51: /* UINT8_PACKED_422 */
    case 0x55: /* UINT8_SEMIPLANAR_422 */
    case 0x5b: /* UINT8_PLANAR_422 */
    case 0xa2: /* NV16 */
    case 0xa5: /* YUY2 */
    case 0xc1: /* UNORM_INT8X2 */
    case 0xc3: /* UNORM_INT16X1 */
    case 0xc7: /* SNORM_INT8X2 */
    case 0xc9: /* SNORM_INT16X1 */
        return 16;
    case 0x54: /* UINT16_SEMIPLANAR_420 */
    case 0x57: /* UINT8_SEMIPLANAR_444 */
    case 0x5a: /* UINT16_PLANAR_420 */
    case 0x5d: /* UINT8_PLANAR_444 */
    case 0x9f: /* P010 */
    case 0xa1: /* P016 */
    case 0xb2: /* Y444_PLANAR8 */
    case 0xb4: /* YUV444_8bit_SemiPlanar */
        return 24;
    case 0x50:          /* UNORM_INT_101010_2 */
    case 0x52:          /* UINT8_PACKED_444 */
    case 0x56:          /* UINT16_SEMIPLANAR_422 */
    case 0x5c:          /* UINT16_PLANAR_422 */
    case 0xa3 ... 0xa4: /* P210, P216 */
    case 0xa6 ... 0xa9: /* Y210, Y216, AYUV, Y410 */
    case 0xc2:          /* UNORM_INT8X4 */
    case 0xc4:          /* UNORM_INT16X2 */
    case 0xc8:          /* SNORM_INT8X4 */
    case 0xca:          /* SNORM_INT16X2 */
        return 32;
    case 0x58: /* UINT16_SEMIPLANAR_444 */
    case 0x5e: /* UINT16_PLANAR_444 */
    case 0xb3: /* Y444_PLANAR10 */
    case 0xb5: /* YUV444_16bit_SemiPlanar */
        return 48;
    case 0xb1: /* Y416 */
    case 0xc5: /* UNORM_INT16X4 */
    case 0xcb: /* SNORM_INT16X4 */
        return 64;
    default:
        return 4; /* also BC1 and BC4 */
    }
}
