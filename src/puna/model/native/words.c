// Integers in the words of `pack-quantized` files (words.py), brought into the panels of linear.c.

static uint32_t spread(uint32_t x) {  // four nibbles, each into a byte of its own
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
}

// words [outputs][count] to panels [outputs / 16][count][16]; outputs is a multiple of 16. At 8 bits a word stays as it
// is; at 4 bits its byte i gets values i (low half) and i + 4.
void NAME(panel_words)(const uint32_t *words, uint32_t *panels, long outputs, long count, int bits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (outputs * count > 32768)
    for (long panel = 0; panel < outputs / 16; panel++) {
        const uint32_t *from = words + panel * 16 * count;
        uint32_t *to = panels + panel * 16 * count;
        for (long i = 0; i < count; i++) {
            uint32_t lanes[16];
            for (int n = 0; n < 16; n++) lanes[n] = from[n * count + i];
            if (bits == 4)
                for (int n = 0; n < 16; n++) lanes[n] = spread(lanes[n] & 0xffff) | spread(lanes[n] >> 16) << 4;
            memcpy(to + i * 16, lanes, 64);
        }
    }
}

// Values of -32..31 in bytes [outputs][inputs], each `zero` above its value, to panels of 6 bits; outputs and inputs are
// multiples of 16.
void NAME(panel_six)(const uint8_t *bytes, uint8_t *panels, long outputs, long inputs, int zero, int threads) {
    const uint32_t nibbles = 0x0f0f0f0f, pairs = 0x03030303;
#pragma omp parallel for num_threads(threads) schedule(static) if (outputs * inputs > 32768)
    for (long panel = 0; panel < outputs / 16; panel++) {
        const uint8_t *from = bytes + panel * 16 * inputs;
        uint32_t *to = (uint32_t *)(panels + panel * inputs * 12);
        for (long k = 0; k < inputs; k += 16, to += 48)
            for (int n = 0; n < 16; n++) {
                uint8_t six[16];
                for (int i = 0; i < 16; i++) six[i] = (uint8_t)(from[n * inputs + k + i] - zero + 32);
                uint32_t fours[4];
                memcpy(fours, six, 16);
                to[n] = (fours[0] & nibbles) | (fours[1] & nibbles) << 4;
                to[16 + n] = (fours[2] & nibbles) | (fours[3] & nibbles) << 4;
                to[32 + n] = 0;
                for (int i = 0; i < 4; i++) to[32 + n] |= (fours[i] >> 4 & pairs) << 2 * i;
            }
    }
}
