#pragma once
#include <zstd.h>

// ZSTD_c_literalCompressionMode is public only to static linking; its number is part of the
// library's interface all the same. The value 1 is ZSTD_ps_enable: always Huffman.
static const ZSTD_cParameter smelt_zstd_literal_mode = ZSTD_c_experimentalParam5;
