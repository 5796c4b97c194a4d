// Any other x86-64 with AVX2 and FMA: the same functions, sixteen lanes as two registers.
#pragma GCC target("avx2,fma,f16c")
#define AVX512 0
#define NAME(function) function##_avx2
#include "simd.h"
#include "linear.c"
#include "rows.c"
#include "elementwise.c"
#include "quantize.c"
#include "words.c"
#include "attention.c"
#include "experts.c"
#include "layers.c"
#include "vision.c"
#include "training.c"
#include "causal.c"
