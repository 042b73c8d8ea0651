// The parameters of every kernel: one struct each, passed by value. kernels/cuda-abi mirrors them for Rust, and a test compares
// sizes and offsets. One field per line: the test reads this file.
//
// Pointers are to device memory, 16-byte aligned. "T" is the entry's element type (bf16, f16 or f32). Matrices are row-major and
// dense unless a stride is named; sizes are in elements.
//
// K and V of one layer are [block][kv_head][block_size][head_dim] of T each: a KV head's part of a block is one stretch of memory
// (4 KiB for 16 positions of 128 in bf16), which is what one tile of attention reads. A slot is block * block_size + offset;
// blocks * kv_heads * block_size is below 2^32.
#pragma once

#include <stdint.h>

// Where an optional number is absent.
#define KVERN_NONE 0xffffffffu

// out[r][:] = table[ids[r]][:]; grid = rows. Also gather of rows: the table is then x.
struct GatherParams {
    const void *table;
    const uint32_t *ids;
    void *out;
    uint32_t rows;
    uint32_t columns;
    uint32_t table_rows;
    uint32_t pad;
};

// out = x / sqrt(mean(x^2) + eps) * weight per row; grid = rows. In add_rms_norm x is first added to `residual` and the
// sum, rounded to T, is both the new residual and what is normed; rms_norm does not use it.
struct RmsNormParams {
    const void *x;
    void *residual;
    const void *weight;
    void *out;
    uint32_t rows;
    uint32_t columns;
    float eps;
    uint32_t pad;
};

// out[r][i] = act(x[r][i]) * x[r][columns + i]; x [rows][2 columns] (gate, then up); any grid.
struct GateParams {
    const void *x;
    void *out;
    uint32_t rows;
    uint32_t columns;
};

// Copies whole blocks of K and V in every layer: pairs[2 i] -> pairs[2 i + 1]. Blocks of a pool lie block_bytes apart; each of
// `pools` entries (K and V of every layer) is one pool. No block is in two pairs. Grid = (pairs, pools); sizes are multiples of 16.
struct BlockCopyParams {
    const uint64_t *pools;
    const uint32_t *pairs;
    uint64_t block_bytes;
    uint32_t pair_count;
    uint32_t pool_count;
};

// One sequence's rows of a step. `sampled` is the index into last_sampled that the one row's token comes from, or NONE: then
// ids has been filled by the host.
struct SequenceSlice {
    uint32_t row;
    uint32_t rows;
    uint32_t start;
    uint32_t table;
    uint32_t sampled;
};

// From slices to rows: positions[row], slots[row] and, where marked, ids[row]. Grid = sequences.
struct StepInputsParams {
    const SequenceSlice *slices;
    const uint32_t *block_tables;
    const uint32_t *last_sampled;
    uint32_t *ids;
    uint32_t *positions;
    uint32_t *slots;
    uint32_t sequences;
    uint32_t table_stride;
    uint32_t block_size;
    uint32_t pad;
};

// In place on qkv [rows][(heads + 2 kv_heads) head_dim]: norm per head of q and k where weights are given, RoPE of the first
// rotary_dim values, q written back, k and v written to the cache. k and v in qkv stay as they were. cos and sin are f32,
// [positions][rotary_dim / 2]. Warps = rows * (heads + 2 kv_heads). head_dim and rotary_dim / 2 are even.
struct RopeStoreParams {
    void *qkv;
    void *k_cache;
    void *v_cache;
    const void *q_weight;
    const void *k_weight;
    const float *cos;
    const float *sin;
    const uint32_t *positions;
    const uint32_t *slots;
    uint32_t rows;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_size;
    uint32_t rotary_dim;
    uint32_t head_dim;
    float eps;
    uint32_t pad;
};

// A piece of decode attention: positions first..end of one sequence, for one query row. `partial` is where its result goes,
// or NONE: then it is all there is and goes to out.
struct DecodeItem {
    uint32_t row;
    uint32_t table;
    uint32_t first;
    uint32_t end;
    uint32_t partial;
};

// Pieces first..first + count of one row, in order of position. An entry with count 0 is spare: nothing is written for it.
struct DecodeMerge {
    uint32_t row;
    uint32_t first;
    uint32_t count;
};

// Decode: out[row] [heads * head_dim]. Block x takes the items starts[x]..starts[x + 1]; grid = (workers, kv_heads * head tiles)
// with head tiles = ceil(group / 16). Partial p of head h: sums[(p * heads + h) * 2] = max, sum (base 2), and
// values[(p * heads + h) * head_dim] = weighted values, not divided by the sum; f32. The merge reads them; grid = (merges, heads).
struct DecodeParams {
    const void *qkv;
    const void *k_cache;
    const void *v_cache;
    void *out;
    const DecodeItem *items;
    const uint32_t *starts;
    const DecodeMerge *merges;
    const uint32_t *block_tables;
    float *sums;
    float *values;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_size;
    uint32_t table_stride;
    uint32_t qkv_stride;
    float scale_log2;
};

// A query row of sequences that share a prefix: its row in the batch, and its first partial result.
struct CascadeRow {
    uint32_t row;
    uint32_t partial;
};

// Piece `piece` of a shared prefix, the positions first..end of the block table `table`, for rows first_row..first_row + rows of
// the list. `first` is a multiple of 64.
struct CascadeTile {
    uint32_t first_row;
    uint32_t rows;
    uint32_t first;
    uint32_t end;
    uint32_t table;
    uint32_t piece;
};

// Decode over shared prefixes: partial results as in DecodeParams. Grid = (tiles, kv_heads); tiles as of prefill.
struct CascadeParams {
    const void *qkv;
    const void *k_cache;
    const void *v_cache;
    const CascadeTile *tiles;
    const CascadeRow *rows;
    const uint32_t *block_tables;
    float *sums;
    float *values;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_size;
    uint32_t table_stride;
    uint32_t qkv_stride;
    float scale_log2;
};

// Some query rows of one sequence: rows row..row + rows, the first at `position`.
struct PrefillTile {
    uint32_t row;
    uint32_t rows;
    uint32_t position;
    uint32_t table;
};

// Prefill: causal, the query at position p sees max(0, p - window + 1)..=p (window 0: all). Grid = (tiles, kv_heads); a tile holds
// at most query_rows / group rows, where query_rows is the kernel's number of packed (row, head) pairs. For the f32 kernel the
// grid is (tiles, heads).
struct PrefillParams {
    const void *qkv;
    const void *k_cache;
    const void *v_cache;
    void *out;
    const PrefillTile *tiles;
    const uint32_t *block_tables;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_size;
    uint32_t table_stride;
    uint32_t qkv_stride;
    uint32_t window;
    float scale_log2;
    uint32_t head_dim;
};

// A driver's description of a tensor, from which boxes are copied; only the driver knows what the words say.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

// Prefill for sm_90a, as above. The maps are of K and of V of one layer, as [blocks * kv_heads * block_size][head_dim]; a box is
// block_size rows of one panel: of 64 values, or of 32 where head_dim is no multiple of 64. block_size is a multiple of 8 that
// divides the tile's positions.
struct PrefillHopperParams {
    TensorMap k_map;
    TensorMap v_map;
    const void *qkv;
    void *out;
    const PrefillTile *tiles;
    const uint32_t *block_tables;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_size;
    uint32_t table_stride;
    uint32_t qkv_stride;
    uint32_t window;
    float scale_log2;
    uint32_t pad;
    uint64_t unused[8];
};

// out[r][n] = sum over k of x[r][k] w[n][k] (+ bias[n]); x T [rows][inner], rows 1 to 8. w is T or GGUF blocks as stored.
// out is T, or f32 where out_f32 is not 0: logits. Its rows lie out_stride elements apart, so that weights of different formats write
// parts of one wide row. Grid = ceil(outputs / 4). inner is a multiple of 8, or of the format's block. Where prefetch is not 0,
// a block's first weights are fetched before it waits for the launches before: for launches that begin early.
struct GemvParams {
    const void *x;
    const void *w;
    const void *bias;
    void *out;
    uint32_t rows;
    uint32_t inner;
    uint32_t outputs;
    uint32_t out_stride;
    uint32_t out_f32;
    uint32_t prefetch;
};

// out[i] = value of element i of GGUF blocks as stored; `elements` is a multiple of 256; any grid.
struct DequantizeParams {
    const void *blocks;
    void *out;
    uint64_t elements;
};

// out[i] = uniform in [-limit, limit) from (seed, i); any grid.
struct FillParams {
    void *out;
    uint64_t elements;
    uint64_t seed;
    float limit;
    uint32_t pad;
};

// How one row is sampled. Fields as the server's sampling parameters; top_k 0 is all. bias_first..bias_first + bias_count are
// entries of the bias arrays, count_first.. of the token counts; within a row the tokens of each are distinct.
//
// Penalties are for the seen tokens of slot seen_slot, NONE for a row without penalties; the rows of a launch have slots of their
// own. Where seen_anew is not 0 the slot takes the row's token counts, and nothing else, before it is read; otherwise it goes on as
// it is, and the row has no counts. The token that the row samples is added to it.
struct SampleRow {
    uint64_t seed;
    uint32_t position;
    float temperature;
    float top_p;
    float min_p;
    uint32_t top_k;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    uint32_t bias_first;
    uint32_t bias_count;
    uint32_t count_first;
    uint32_t count_count;
    uint32_t top_logprobs;
    uint32_t wants_logprob;
    uint32_t seen_slot;
    uint32_t seen_anew;
};

constexpr uint16_t SEEN_IN_PROMPT = 0x8000, SEEN_COUNT_MAX = 0x7fff;

// A token that the prompt or the output holds: its count in the output, 0 for one that only the prompt holds.
struct TokenCount {
    uint32_t token;
    uint32_t count;
};

// A bias of a token's logit; -infinity forbids it.
struct TokenBias {
    uint32_t token;
    float bias;
};

// Weights of one bin: their mass in units of 2^-40, and how many they are.
struct SampleBin {
    uint64_t mass;
    uint32_t count;
    uint32_t pad;
};

// A block takes SAMPLE_SLICE tokens of one row: grid = (rows, parts), parts = ceil(vocab / SAMPLE_SLICE). At most SAMPLE_VOCAB_MAX
// tokens are a vocabulary. SAMPLE_LISTED tokens between which a draw is decided have room in a row's list. Of bins there are
// SAMPLE_BINS, as many as the upper 13 bits of a weight have values.
constexpr uint32_t SAMPLE_SLICE = 8192, SAMPLE_VOCAB_MAX = 1u << 20, SAMPLE_LISTED = 8192, SAMPLE_BINS = 2048;

// What a part leaves for the end of its row, 64 bits each: the best of its logits, and of its adjusted ones; the mass of its
// weights, and that under the raw logits; then its top_stride best logits.
constexpr uint32_t SAMPLE_PARTIALS = 4;

// logits f32 [rows][vocab], unchanged; scratch f32 [rows][vocab]. tokens[r] is the sampled one, or NONE where the row holds NaN or
// +infinity or nothing finite. mask, where not null, has one bit per token, [rows][ceil(vocab / 32)]: a zero forbids it.
// logprobs[r][0] is the token's under the raw logits; then those of the top_logprobs likeliest, whose tokens are in
// top_tokens[r]. Both have top_stride entries per row for the top ones. seen [slots][vocab]: 0 for a token that was not seen, else how
// often the output has it, up to SEEN_COUNT_MAX, and SEEN_IN_PROMPT where it is known to be in the prompt.
//
// Between the launches of one step: partials [rows][parts][SAMPLE_PARTIALS + top_stride]; bins [rows][SAMPLE_BINS]; listed
// [rows][SAMPLE_LISTED], a weight's bits above a token's complement; counters [rows][4], blocks of each launch that are done and
// the length of the list: zeros before the first launch, and after each step.
struct SampleParams {
    const float *logits;
    float *scratch;
    const SampleRow *rows;
    const TokenBias *biases;
    const TokenCount *counts;
    const uint32_t *mask;
    uint32_t *tokens;
    float *logprobs;
    uint32_t *top_tokens;
    uint16_t *seen;
    uint64_t *partials;
    SampleBin *bins;
    uint64_t *listed;
    uint32_t *counters;
    uint32_t vocab;
    uint32_t top_stride;
};
