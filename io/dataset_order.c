/* dataset_order: the order in which images are stored and visited, see dataset.h. */
#include "io/dataset.h"

#include "src/rng.h"

#define PERMUTE_BITS   47
#define FEISTEL_ROUNDS 10

/* One pass of the network over `bits` bits, cut into a low half of bits / 2 and a high half of the
 * rest; the round function is Philox at (seed, epoch, other half, round). */
static uint64_t feistel(md_rng_key key, int bits, uint64_t x)
{
    int low_bits = bits / 2;
    uint64_t low_mask = ((uint64_t)1 << low_bits) - 1;
    uint64_t high_mask = ((uint64_t)1 << (bits - low_bits)) - 1;
    uint64_t low = x & low_mask, high = x >> low_bits;
    for (uint32_t round = 0; round < FEISTEL_ROUNDS; round += 2) {
        uint32_t word[4];
        key.index = high;
        md_rng_bits(key, round, word);
        low ^= word[0] & low_mask;
        key.index = low;
        md_rng_bits(key, round + 1, word);
        high ^= word[0] & high_mask;
    }
    return high << low_bits | low;
}

static int64_t permute(md_rng_key key, int64_t n, int64_t p)
{
    MD_ASSERT(n >= 1 && n <= (int64_t)1 << PERMUTE_BITS && p >= 0 && p < n, "p %lld, n %lld",
              (long long)p, (long long)n);
    int bits = 2;
    while ((int64_t)1 << bits < n)
        bits++;
    uint64_t x = (uint64_t)p;
    /* From a start inside, the cycle comes back inside: at worst to p itself. */
    do
        x = feistel(key, bits, x);
    while (x >= (uint64_t)n);
    return (int64_t)x;
}

int64_t md_permute(uint64_t seed, uint32_t epoch, int64_t n, int64_t p)
{
    return permute((md_rng_key){seed, MD_RNG_SHUFFLE, epoch, 0}, n, p);
}

int64_t md_store_order(uint64_t seed, int64_t n, int64_t p)
{
    return permute((md_rng_key){seed, MD_RNG_STORE_ORDER, 0, 0}, n, p);
}

int64_t md_epoch_steps(int64_t n, int64_t batch)
{
    MD_ASSERT(n >= 0 && batch >= 1, "n %lld, batch %lld", (long long)n, (long long)batch);
    return n / batch;
}

md_position md_position_at(const md_order *o, int64_t step, int64_t b)
{
    int64_t steps = md_epoch_steps(o->n, o->batch);
    MD_ASSERT(steps >= 1 && step >= 0 && b >= 0 && b < o->batch, "step %lld, image %lld",
              (long long)step, (long long)b);
    md_position at = {.epoch = (uint32_t)(step / steps), .place = step % steps * o->batch + b};
    at.sample = md_permute(o->seed, at.epoch, o->n, at.place);
    return at;
}
