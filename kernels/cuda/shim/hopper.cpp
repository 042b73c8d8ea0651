// The shim's barriers that count bytes, copies of boxes, and writes that a fence makes visible.

#include "hopper.h"
#include "products.h"
#include "runtime.h"

#include <deque>
#include <vector>

namespace shim {

// What the driver of the shim writes into a map.
struct BoxMap {
    uint64_t magic, memory, element_bytes, columns, rows, row_bytes, box_columns, box_rows, swizzle_bytes;
};
constexpr uint64_t MAP_MAGIC = 0x6b7665726e6d6170;
// What lies where a barrier is, so that writing over one shows.
constexpr uint64_t BARRIER_MAGIC = 0x6b7665726e626172;
constexpr uint32_t BYTES_MAX = (1 << 20) - 1;

struct BoxCopy {
    uint32_t to;
    BoxMap map;
    uint32_t x, y;
};

struct Barrier {
    uint64_t *at;
    uint32_t arrivals, left, phase;
    int64_t bytes;
    // Who made it, and whether copies may know it.
    uint32_t maker;
    bool is_visible;
    std::deque<BoxCopy> copies;
    // Threads that wait, how many copies may take place now, and turns of who waits.
    uint32_t waiters, granted, turns;
};

struct Store {
    void *to;
    uint4 words;
};

struct NamedBarrier {
    uint32_t arrived, threads, generation;
};

static thread_local std::deque<Barrier> barriers;
static thread_local std::vector<std::vector<Store>> stores;
static thread_local NamedBarrier named[16];

uint32_t shared_address(const void *at) {
    return static_cast<uint32_t>(static_cast<const unsigned char *>(at) - shared_memory());
}

static Barrier &find(const uint64_t *at) {
    for (Barrier &barrier : barriers) {
        if (barrier.at == at) {
            if (*at != BARRIER_MAGIC) {
                fault("a barrier was written over");
            }
            return barrier;
        }
    }
    fault("a barrier that was not made, or is none yet for this thread");
}

void barrier_init(uint64_t *at, uint32_t arrivals) {
    if (reinterpret_cast<uintptr_t>(at) % 8 != 0 || arrivals == 0 || arrivals > BYTES_MAX) {
        fault("a barrier of %u arrivals at %p", arrivals, static_cast<void *>(at));
    }
    for (const Barrier &barrier : barriers) {
        if (barrier.at == at) {
            fault("a barrier was made twice");
        }
    }
    *at = BARRIER_MAGIC;
    barriers.push_back({at, arrivals, arrivals, 0, 0, thread(), false, {}, 0, 0, 0});
}

// The phase ends with the last arrival and the last byte.
static void end_phase_if_due(Barrier &barrier) {
    if (barrier.left == 0 && barrier.bytes == 0) {
        ++barrier.phase;
        ++barrier.turns;
        barrier.left = barrier.arrivals;
    }
}

void barrier_arrive(uint64_t *at, uint32_t bytes) {
    Barrier &barrier = find(at);
    if (barrier.left == 0) {
        fault("more than %u arrivals in a phase of a barrier", barrier.arrivals);
    }
    if (barrier.bytes + bytes > BYTES_MAX) {
        fault("a barrier that waits for %lld bytes and %u", static_cast<long long>(barrier.bytes), bytes);
    }
    --barrier.left;
    barrier.bytes += bytes;
    end_phase_if_due(barrier);
}

// A box takes place row by row; what lies outside of the tensor is zeros.
static void copy_now(Barrier &barrier) {
    const size_t at = is_reverse() ? barrier.copies.size() - 1 : 0;
    const BoxCopy copy = barrier.copies[at];
    barrier.copies.erase(barrier.copies.begin() + static_cast<std::ptrdiff_t>(at));
    const BoxMap &map = copy.map;
    for (uint64_t row = 0; row < map.box_rows; ++row) {
        for (uint64_t column = 0; column < map.box_columns; ++column) {
            uint32_t to = copy.to + static_cast<uint32_t>((row * map.box_columns + column) * map.element_bytes);
            to ^= to >> 3 & (static_cast<uint32_t>(map.swizzle_bytes) - 16);
            const uint64_t x = copy.x + column, y = copy.y + row;
            if (x < map.columns && y < map.rows) {
                const uint64_t from = map.memory + y * map.row_bytes + x * map.element_bytes;
                memcpy(shared_memory() + to, reinterpret_cast<const void *>(from), map.element_bytes);
            } else {
                memset(shared_memory() + to, 0, map.element_bytes);
            }
        }
    }
    barrier.bytes -= static_cast<int64_t>(map.box_rows * map.box_columns * map.element_bytes);
    if (barrier.bytes < 0) {
        fault("copies of %lld bytes more than the barrier expected", static_cast<long long>(-barrier.bytes));
    }
    end_phase_if_due(barrier);
}

void barrier_wait(uint64_t *at, uint32_t parity) {
    Barrier &barrier = find(at);
    if (parity > 1) {
        fault("a parity of %u", parity);
    }
    // A phase of this parity is over where the current one has the other.
    while (barrier.phase % 2 == parity) {
        if (barrier.granted > 0) {
            --barrier.granted;
            copy_now(barrier);
            continue;
        }
        ++barrier.waiters;
        const uint32_t turn = barrier.turns;
        wait_while(&barrier.turns, turn);
        --barrier.waiters;
    }
}

void named_barrier(uint32_t number, uint32_t count) {
    if (number == 0 || number > 15 || count % 32 != 0 || count == 0 || count > threads()) {
        fault("barrier %u of %u threads", number, count);
    }
    NamedBarrier &barrier = named[number];
    if (barrier.arrived != 0 && barrier.threads != count) {
        fault("barrier %u of %u threads, and of %u", number, count, barrier.threads);
    }
    barrier.threads = count;
    const uint32_t generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        wait_while(&barrier.generation, generation);
    }
}

void store_shared_128(void *to, uint4 words) {
    check_aligned(to);
    const uint32_t at = shared_address(to);
    if (at < DYNAMIC_AT || at + 16 > DYNAMIC_AT + dynamic_bytes()) {
        fault("a store at %u of shared memory, outside of the dynamic part", at);
    }
    stores[thread()].push_back({to, words});
}

void fence_proxy_async() {
    for (const Store &store : stores[thread()]) {
        memcpy(store.to, &store.words, 16);
    }
    stores[thread()].clear();
    for (Barrier &barrier : barriers) {
        barrier.is_visible = barrier.is_visible || barrier.maker == thread();
    }
}

void copy_box(void *to, const TensorMap &map, uint32_t x, uint32_t y, uint64_t *at) {
    Barrier &barrier = find(at);
    BoxCopy copy = {shared_address(to), {}, x, y};
    memcpy(&copy.map, map.words, sizeof(copy.map));
    const BoxMap &box = copy.map;
    if (reinterpret_cast<uintptr_t>(&map) % 64 != 0 || box.magic != MAP_MAGIC) {
        fault("a copy by what is no map");
    }
    const uint64_t bytes = box.box_rows * box.box_columns * box.element_bytes;
    // Rows that are no whole repeat of the swizzle would be permuted with their neighbors.
    if (copy.to % (8 * box.swizzle_bytes) != 0 || bytes % (8 * box.swizzle_bytes) != 0) {
        fault("a box of %llu bytes at %u, which its swizzle of %llu does not fit", static_cast<unsigned long long>(bytes),
              copy.to, static_cast<unsigned long long>(box.swizzle_bytes));
    }
    if (copy.to < DYNAMIC_AT || copy.to + bytes > DYNAMIC_AT + dynamic_bytes()) {
        fault("a box of %llu bytes at %u, outside of shared memory", static_cast<unsigned long long>(bytes), copy.to);
    }
    if (!barrier.is_visible) {
        fault("a copy whose barrier was made without a fence");
    }
    memset(to, POISON, bytes);
    barrier.copies.push_back(copy);
}

void hopper_begin() {
    barriers.clear();
    stores.assign(threads(), {});
    for (NamedBarrier &barrier : named) {
        barrier = {};
    }
    products_begin_block();
}

void hopper_end() {
    for (const Barrier &barrier : barriers) {
        if (!barrier.copies.empty()) {
            fault("%zu copies were not waited for", barrier.copies.size());
        }
    }
    for (const std::vector<Store> &own : stores) {
        if (!own.empty()) {
            fault("writes for products without a fence after them");
        }
    }
    products_end_block();
}

// One copy for which somebody waits.
static bool advance_copy() {
    const size_t count = barriers.size();
    for (size_t i = 0; i < count; ++i) {
        Barrier &barrier = barriers[is_reverse() ? count - 1 - i : i];
        if (barrier.waiters > 0 && barrier.copies.size() > barrier.granted) {
            ++barrier.granted;
            ++barrier.turns;
            return true;
        }
    }
    return false;
}

// Products go first in one order of threads, and copies in the other.
bool hopper_advance() {
    return is_reverse() ? advance_copy() || products_advance() : products_advance() || advance_copy();
}

} // namespace shim
