// The shim's products of a warpgroup: descriptors, operands in shared memory, and when what is read and written.

#include "hopper.h"
#include "products.h"
#include "runtime.h"

#include <vector>

namespace shim {

// A product that a warp has begun: the lanes' parts, and what was read then.
struct Begun {
    Product lanes[32];
    uint32_t weights[32][4];
    uint64_t operands;
};

// Accumulators of a warp that are under way: of 32 lanes each, where they are and what is in them.
struct Accumulators {
    float *at[32];
    uint32_t columns, products;
    std::vector<float> values;
};

struct WarpProducts {
    std::vector<Begun> begun;
    std::vector<Accumulators> accumulators;
    // Where batches end, as numbers of products, and how many may be left, where lanes wait.
    std::vector<size_t> batches;
    bool waits, is_fenced;
    size_t most_left;
    uint32_t turns;
    // Products since the block's start.
    size_t count;
};

// What a warpgroup has begun, by the first of its warps to come.
struct Issued {
    uint64_t a_tile, b_tile;
    uint32_t columns;
    bool add;
};

static thread_local std::vector<WarpProducts> warps;
static thread_local std::vector<std::vector<Issued>> groups;

static WarpProducts &own_warp() { return warps[thread() / 32]; }

// A matrix in shared memory, as its descriptor names it.
struct Matrix {
    uint32_t start, leading, stride, swizzle;

    explicit Matrix(uint64_t descriptor) {
        auto bytes = [descriptor](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3fff) * 16; };
        start = bytes(0);
        leading = bytes(16);
        stride = bytes(32);
        const uint32_t modes[4] = {0, 128, 64, 32};
        swizzle = modes[descriptor >> 62];
        if (swizzle < 64 || (descriptor >> 49 & 7) != 0) {
            fault("a descriptor %016llx that is neither swizzled by 128 nor by 64 bytes, from its pattern's start",
                  static_cast<unsigned long long>(descriptor));
        }
    }

    void check(bool is_aligned) const {
        if (!is_aligned) {
            fault("a matrix at %u, by %u and %u bytes, does not lie as its swizzle of %u repeats", start, leading,
                  stride, swizzle);
        }
    }

    // Of 16-bit elements; `along` is the one along the sum.
    uint16_t at(uint32_t offset) const {
        uint32_t address = start + offset;
        address ^= address >> 3 & (swizzle - 16);
        if (address + 2 > dynamic_bytes() + DYNAMIC_AT) {
            fault("a product reads at %u in shared memory, beyond what is there", address);
        }
        uint16_t element;
        memcpy(&element, shared_memory() + address, 2);
        return element;
    }

    // 16 elements of `rows` rows that lie along the sum: elements[row][k].
    void read_along(uint32_t first, uint32_t rows, uint16_t *elements) const {
        const uint32_t repeats = 8 * swizzle;
        check(start % repeats % swizzle <= swizzle - 32 && start % repeats < swizzle && stride % repeats == 0);
        for (uint32_t row = first; row < first + rows; ++row) {
            for (uint32_t k = 0; k < 16; ++k) {
                *elements++ = at(row / 8 * stride + row % 8 * swizzle + k * 2);
            }
        }
    }

    // The same of rows that lie across it.
    void read_across(uint32_t rows, uint16_t *elements) const {
        const uint32_t repeats = 8 * swizzle, panel = swizzle / 2;
        check(start % repeats == 0 && stride % repeats == 0 && leading % repeats == 0);
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t k = 0; k < 16; ++k) {
                *elements++ = at(row / panel * leading + row % panel * 2 + k / 8 * stride + k % 8 * swizzle);
            }
        }
    }
};

// What this warp multiplies: its 16 rows of a, and b, 16 elements each; a from shared memory or from the lanes' weights.
struct Operands {
    uint16_t a[16][16], b[256][16];

    Operands(const Begun &begun, uint32_t warp) {
        const Product &product = begun.lanes[0];
        const Matrix b_tile(product.b_tile);
        if (!product.weights) {
            Matrix(product.a_tile).read_along(warp % 4 * 16, 16, a[0]);
            b_tile.read_along(0, product.columns, b[0]);
            return;
        }
        b_tile.read_across(product.columns, b[0]);
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 8; ++i) {
                // Four registers: rows lane / 4 and 8 on, then the same of the next eight columns.
                const int row = lane / 4 + i / 2 % 2 * 8, column = lane % 4 * 2 + i % 2 + i / 4 * 8;
                a[row][column] = static_cast<uint16_t>(begun.weights[lane][i / 2] >> (i % 2 * 16));
            }
        }
    }

    uint64_t digest(uint32_t columns) const {
        uint64_t hash = 0xcbf29ce484222325u;
        auto add = [&hash](uint16_t element) { hash = (hash ^ element) * 0x100000001b3u; };
        for (auto &row : a) {
            for (uint16_t element : row) {
                add(element);
            }
        }
        for (uint32_t row = 0; row < columns; ++row) {
            for (uint16_t element : b[row]) {
                add(element);
            }
        }
        return hash;
    }
};

static bool is_poison(const float *values, uint32_t count) {
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(values);
    for (uint32_t i = 0; i < count * 4; ++i) {
        if (bytes[i] != POISON) {
            return false;
        }
    }
    return true;
}

static void check_untouched(const Accumulators &own) {
    for (float *values : own.at) {
        if (!is_poison(values, own.columns / 2)) {
            fault("accumulators were written while products were under way");
        }
    }
}

static Accumulators *find(WarpProducts &warp, const float *acc) {
    for (Accumulators &own : warp.accumulators) {
        if (own.at[0] == acc) {
            return &own;
        }
    }
    return nullptr;
}

// All warps of a warpgroup begin the same products.
static void check_group(WarpProducts &warp, const Product &product) {
    std::vector<Issued> &group = groups[thread() / 128];
    const Issued issued = {product.a_tile, product.b_tile, product.columns, product.add};
    if (group.size() <= warp.count) {
        group.push_back(issued);
    }
    const Issued &first = group[warp.count++];
    if (first.a_tile != issued.a_tile || first.b_tile != issued.b_tile || first.columns != issued.columns ||
        first.add != issued.add) {
        fault("warps of a warpgroup multiply different matrices");
    }
}

// By the last lane of a warp.
static void begin(Slot *slots) {
    WarpProducts &warp = own_warp();
    Begun begun = {};
    for (int lane = 0; lane < 32; ++lane) {
        Product &own = begun.lanes[lane], &first = begun.lanes[0];
        memcpy(&own, slots[lane].bytes, sizeof(own));
        if (own.a_tile != first.a_tile || own.b_tile != first.b_tile || own.columns != first.columns ||
            own.add != first.add || !own.weights != !first.weights) {
            fault("lanes of a warp multiply different matrices");
        }
        if (own.weights) {
            memcpy(begun.weights[lane], own.weights, sizeof(begun.weights[lane]));
        }
    }
    const Product &product = begun.lanes[0];
    if (!warp.is_fenced) {
        fault("products without a fence since registers were free to change");
    }
    check_group(warp, product);
    Accumulators *known = find(warp, product.acc);
    if (!known) {
        Accumulators own = {};
        own.columns = product.columns;
        for (int lane = 0; lane < 32; ++lane) {
            float *values = own.at[lane] = begun.lanes[lane].acc;
            own.values.insert(own.values.end(), values, values + own.columns / 2);
            memset(values, POISON, own.columns / 2 * sizeof(float));
        }
        warp.accumulators.push_back(own);
        known = &warp.accumulators.back();
    }
    check_untouched(*known);
    ++known->products;
    begun.operands = Operands(begun, thread() / 32).digest(product.columns);
    warp.begun.push_back(begun);
}

void begin_product(const Product &product) {
    static_assert(sizeof(Product) <= sizeof(Slot), "a lane's part fits its slot");
    if (thread() / 128 >= threads() / 128) {
        fault("products by warps that are no warpgroup");
    }
    meet(Meeting::Products, &product, sizeof(product), begin);
}

// The warp's oldest product.
static void finish(WarpProducts &warp) {
    const Begun begun = warp.begun.front();
    const Product &product = begun.lanes[0];
    for (int lane = 0; lane < 32; ++lane) {
        const uint32_t *weights = begun.lanes[lane].weights;
        if (weights && memcmp(weights, begun.weights[lane], sizeof(begun.weights[lane])) != 0) {
            fault("weights were written while products were under way");
        }
    }
    const Operands operands(begun, thread() / 32);
    if (operands.digest(product.columns) != begun.operands) {
        fault("shared memory was written while products that read it were under way");
    }
    Accumulators &own = *find(warp, product.acc);
    check_untouched(own);
    const uint32_t values = own.columns / 2;
    float a[16][16], b[16];
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            a[row][k] = product.widen(operands.a[row][k]);
        }
    }
    for (uint32_t column = 0; column < own.columns; ++column) {
        for (int k = 0; k < 16; ++k) {
            b[k] = product.widen(operands.b[column][k]);
        }
        for (uint32_t row = 0; row < 16; ++row) {
            const uint32_t lane = row % 8 * 4 + column % 8 / 2;
            float &sum = own.values[lane * values + column / 8 * 4 + row / 8 * 2 + column % 2];
            sum = product.add ? sum : 0.0f;
            for (int k = 0; k < 16; ++k) {
                sum += a[row][k] * b[k];
            }
        }
    }
    if (--own.products == 0) {
        for (int lane = 0; lane < 32; ++lane) {
            memcpy(own.at[lane], &own.values[lane * values], values * sizeof(float));
        }
        warp.accumulators.erase(warp.accumulators.begin() + (&own - warp.accumulators.data()));
    }
    warp.begun.erase(warp.begun.begin());
}

void products_fence() {
    meet(Meeting::Products, nullptr, 0, [](Slot *) { own_warp().is_fenced = true; });
}

void products_commit() {
    meet(Meeting::Products, nullptr, 0, [](Slot *) {
        WarpProducts &warp = own_warp();
        size_t before = 0;
        for (size_t batch : warp.batches) {
            before += batch;
        }
        warp.batches.push_back(warp.begun.size() - before);
    });
}

void products_wait(uint32_t pending) {
    meet(Meeting::Products, &pending, sizeof(pending), [](Slot *slots) {
        uint32_t pending;
        memcpy(&pending, slots[0].bytes, sizeof(pending));
        WarpProducts &warp = own_warp();
        warp.most_left = pending;
        warp.waits = warp.batches.size() > pending;
    });
    WarpProducts &warp = own_warp();
    while (warp.waits && warp.batches.size() > warp.most_left) {
        const uint32_t turn = warp.turns;
        wait_while(&warp.turns, turn);
        // The first lane that goes on does it for all.
        for (; warp.batches.size() > warp.most_left; warp.batches.erase(warp.batches.begin())) {
            for (size_t left = warp.batches.front(); left > 0; --left) {
                finish(warp);
            }
        }
    }
    // The lanes go on together; registers may change from here on.
    meet(Meeting::Products, nullptr, 0, [](Slot *) {
        own_warp().waits = false;
        own_warp().is_fenced = false;
    });
}

void products_begin_block() {
    warps.assign(threads() / 32, WarpProducts{});
    groups.assign(threads() / 128 + 1, {});
}

void products_end_block() {
    for (const WarpProducts &warp : warps) {
        if (!warp.begun.empty()) {
            fault("%zu products of a warp were not waited for", warp.begun.size());
        }
    }
}

bool products_advance() {
    const size_t count = warps.size();
    for (size_t i = 0; i < count; ++i) {
        WarpProducts &warp = warps[is_reverse() ? count - 1 - i : i];
        if (warp.waits && warp.batches.size() > warp.most_left) {
            ++warp.turns;
            return true;
        }
    }
    return false;
}

} // namespace shim
