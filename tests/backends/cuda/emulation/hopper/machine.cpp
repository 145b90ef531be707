// A part of a Hopper GPU on one CPU thread, strict where bugs hide. One cluster runs at a time.
//
// Every CUDA thread is a fiber, which runs until it waits. Copies and products are agents of their own: a copy lands, and a
// product reads shared memory and registers, when the scheduler picks it, some time between its start and what waits for it.
// The scheduler picks at random, or by random priorities that change often or hardly ever (the seed's remainder by 3): some
// agents are then late as long as nothing waits for them. Where none can go on, the error tells who waits for which barrier.
//
// Faults that are told, beside wrong sums: a barrier used before it is initialised or after it was overwritten; arrivals and
// bytes beyond what a phase takes; a copy into what running products may still read; products of what is still being copied;
// sums written while products run; a missing fence of registers; memory out of bounds or not aligned; a block that ends while
// others write into it. Shared memory starts as NaN, and sums are NaN until their products are waited for. Not modelled: time,
// bank conflicts, the order of plain memory accesses, divergence at instructions that a whole warp has to meet at.
#include "machine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulation {

int mutant = 0;

namespace {

constexpr int WARP = 32, GROUP = 128;
constexpr size_t STACK = 64 << 10, WINDOW = 1024;  // dynamic shared memory begins somewhere in the window's first KiB
constexpr uint64_t COOKIE = 0xba221e5000000000;
constexpr uint32_t POISON = 0x7fc0dead;  // of sums whose products are running

struct Block;
struct Thread;
using Waiting = std::vector<Thread*>;

struct Barrier {
  std::string name;
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  Waiting waiting;
};

struct Meeting {  // of a fixed number of threads
  int here = 0, expected = 0;
  unsigned turn = 0;
  Waiting waiting;
};

struct Product {
  Operand a, b;
  bool add = false, of_registers = false;
  int count = 0, joined = 0;
  const uint32_t* left[GROUP] = {};
};

struct WarpGroup {
  std::deque<Product> products;
  int done = 0, retired = 0;  // of them, in order; retired: some thread has waited for it
  float sums[GROUP][128];     // of running products
  uint64_t priority = 0;
  Waiting waiting;
};

struct Warp {
  Meeting meeting;
  uint32_t addresses[2][WARP];
  unsigned side[WARP] = {};
  int runnable = 0;
  uint64_t priority = 0;
};

struct Thread {
  Block* block = nullptr;
  int index = 0, registers = 0;
  bool runnable = false, started = false, done = false, fenced = false;
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
  std::string waits_for;
  // Products of this thread's warp group so far, and how many there were at each commit.
  int products = 0;
  std::vector<int> commits;
  float* sums = nullptr;  // of running products
  int count = 0;
};

struct Block {
  int rank = 0, running = 0, free_registers = 0;
  unsigned index = 0;
  unsigned char* shared = nullptr;  // the window's start
  size_t start = 0, end = 0;        // of dynamic shared memory
  std::vector<Warp> warps;
  std::deque<WarpGroup> groups;
  std::map<uint32_t, Barrier> barriers;
  Meeting meetings[16];
  Waiting for_registers;
};

struct Landing {  // some rows of a box, on their way into a block
  Map map;
  int column, row, first, last;
  Block* to;
  uint32_t at, barrier;
  uint64_t priority;
};

struct Machine {
  uint64_t random = 1;
  int lasting = 0;  // turns that a priority lasts; 0: none are looked at
  std::string error;
  std::vector<std::unique_ptr<Thread>> threads;
  std::deque<Block> blocks;
  std::vector<unsigned char> memory;
  std::vector<Landing> landings;
  Meeting cluster;
  Thread* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  int threads_a_block = 0, grid = 0;
  jmp_buf scheduler, failed;
} machine;

uint64_t draw() {  // splitmix64
  uint64_t x = machine.random += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

[[noreturn]] void fail(const char* format, ...) {
  char text[400], place[80] = "";
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (const Thread* thread = machine.current) {
    snprintf(place, sizeof(place), "block %u, thread %d: ", thread->block->index, thread->index);
  }
  machine.error = std::string(place) + text;
  _longjmp(machine.failed, 1);
}

Thread& self() { return *machine.current; }
Block& here() { return *self().block; }
WarpGroup& group() { return here().groups[self().index / GROUP]; }
Block& peer(uint32_t rank) {
  if (rank >= machine.blocks.size()) fail("there is no block %u in a cluster of %zu", rank, machine.blocks.size());
  return machine.blocks[rank];
}

// --- threads ----------------------------------------------------------------------------------------------------------
void set_runnable(Thread& thread, bool runnable) {
  thread.block->warps[thread.index / WARP].runnable += int(runnable) - int(thread.runnable);
  thread.runnable = runnable;
}
void leave() {
  if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}
void park(Waiting& list, std::string what) {
  self().waits_for = std::move(what);
  set_runnable(self(), false);
  list.push_back(&self());
  leave();
}
void wake(Waiting& list) {
  for (Thread* thread : list) set_runnable(*thread, true);
  list.clear();
}
void maybe_yield() {
  if (draw() % 16 == 0) leave();
}
void meet(Meeting& meeting, int threads, const char* what) {
  if (meeting.here > 0 && meeting.expected != threads) {
    fail("%s of %d threads, others count %d", what, threads, meeting.expected);
  }
  meeting.expected = threads;
  if (++meeting.here == threads) {
    meeting.here = 0, meeting.turn++;
    wake(meeting.waiting);
  } else {
    for (const unsigned turn = meeting.turn; meeting.turn == turn;) park(meeting.waiting, what);
  }
}

// Whether a running product of the block may read what lies from `from` to `to`.
bool read_by_products(const Block& block, uint32_t from, uint32_t to) {
  for (const WarpGroup& g : block.groups) {
    for (size_t i = g.retired; i < g.products.size(); i++) {
      const Product& p = g.products[i];
      auto meets = [&](const Operand& x, int rows) {
        const uint32_t atoms = x.transposed ? 2 * x.stride + (rows * 2 / x.swizzle - 1) * x.leading : rows / 8 * x.stride;
        const uint32_t start = x.address & ~(8u * x.swizzle - 1);
        return start < to && from < start + atoms;
      };
      if ((!p.of_registers && meets(p.a, 64)) || meets(p.b, 2 * p.count)) return true;
    }
  }
  return false;
}

void end_thread() {
  Thread& thread = self();
  if (thread.sums) fail("it ends while its products run");
  thread.done = true;
  set_runnable(thread, false);
  Block& block = here();
  if (--block.running == 0) {
    for (const Landing& landing : machine.landings)
      if (landing.to == &block) fail("the block ends while a copy is on its way into it");
  }
  _longjmp(machine.scheduler, 1);
}
void enter() {
  (*machine.kernel)();
  end_thread();
}
void run(Thread& thread) {
  machine.current = &thread;
  if (_setjmp(machine.scheduler) == 0) {
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
  machine.current = nullptr;
}

// --- barriers and copies ----------------------------------------------------------------------------------------------
Barrier& barrier_at(Block& block, uint32_t at) {
  const auto found = block.barriers.find(at);
  if (block.running == 0) fail("a barrier is used of block %u, which has ended", block.index);
  if (found == block.barriers.end()) fail("there is no barrier at byte %u of block %u", at, block.index);
  uint64_t word;
  memcpy(&word, block.shared + at, 8);
  if (word != (COOKIE | at)) fail("barrier %s was overwritten", found->second.name.c_str());
  return found->second;
}
void settle(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) fail("%s: more bytes came than were announced", barrier.name.c_str());
  barrier.phase++;
  barrier.pending = barrier.count;
  wake(barrier.waiting);
}
void land(const Landing& l) {
  if (l.to->running == 0) fail("a copy lands in block %u, which has ended", l.to->index);
  const int width = l.map.box_columns;
  for (int i = l.first; i < l.last; i++) {
    for (int j = 0; j < width; j++) {
      uint32_t at = l.at + (i * width + j) * 2;
      at ^= (at >> 7 & (l.map.swizzle / 16 - 1)) << 4;
      const int64_t row = l.row + i, column = l.column + j;
      const bool inside = row >= 0 && row < l.map.rows && column >= 0 && column < l.map.columns;
      if (inside) memcpy(l.to->shared + at, l.map.data + row * l.map.stride + column * 2, 2);
      else memset(l.to->shared + at, 0, 2);
    }
  }
  Barrier& barrier = barrier_at(*l.to, l.barrier);
  barrier.bytes -= (l.last - l.first) * width * 2;
  if (barrier.bytes <= -(1 << 20)) fail("%s: bytes out of range", barrier.name.c_str());
  settle(barrier);
}

// --- products ---------------------------------------------------------------------------------------------------------
float bf16_at(const Block& block, uint32_t at, int swizzle) {
  at ^= (at >> 7 & (swizzle / 16 - 1)) << 4;
  if (at < block.start || at + 2 > block.end) fail("a product reads byte %u, outside of shared memory", at);
  uint16_t half;
  memcpy(&half, block.shared + at, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// Entry (row, k) of an operand: atoms of 8 rows of `swizzle` bytes.
uint32_t place_of(const Operand& x, int row, int k) {
  if (!x.transposed) return x.address + row / 8 * x.stride + row % 8 * x.swizzle + k * 2;
  const int atom = x.swizzle / 2;
  return x.address + row / atom * x.leading + k / 8 * x.stride + k % 8 * x.swizzle + row % atom * 2;
}
void multiply(Block& block, WarpGroup& g) {
  static float a[64][16], b[16][256], d[64][256];
  Product& p = g.products[g.done];
  const int columns = 2 * p.count;
  auto each = [&](auto&& act) {  // entries of the sums: thread, its number there, row, column
    for (int t = 0; t < GROUP; t++)
      for (int i = 0; i < p.count; i++) act(t, i, t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2);
  };
  if (p.of_registers) {
    for (int t = 0; t < GROUP; t++) {
      for (int i = 0; i < 8; i++) {
        const uint32_t bits = i % 2 ? p.left[t][i / 2] & 0xffff0000u : p.left[t][i / 2] << 16;
        memcpy(&a[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8], &bits, 4);
      }
    }
  } else {
    for (int r = 0; r < 64; r++)
      for (int k = 0; k < 16; k++) a[r][k] = bf16_at(block, place_of(p.a, r, k), p.a.swizzle);
  }
  for (int k = 0; k < 16; k++)
    for (int c = 0; c < columns; c++) b[k][c] = bf16_at(block, place_of(p.b, c, k), p.b.swizzle);
  each([&](int t, int i, int r, int c) { d[r][c] = p.add ? g.sums[t][i] : 0.0f; });
  for (int r = 0; r < 64; r++)
    for (int k = 0; k < 16; k++)
      for (int c = 0; c < columns; c++) d[r][c] += a[r][k] * b[k][c];
  each([&](int t, int i, int r, int c) { g.sums[t][i] = d[r][c]; });
  g.done++;
  wake(g.waiting);
}

// --- the scheduler ----------------------------------------------------------------------------------------------------
[[noreturn]] void tell_who_waits() {
  std::string text = "nothing can go on:";
  std::map<std::string, std::pair<int, int>> found;
  for (const auto& thread : machine.threads) {
    if (thread->block == nullptr || thread->done) continue;
    auto& [count, first] = found[" of block " + std::to_string(thread->block->index) + " wait for " + thread->waits_for];
    if (count++ == 0) first = thread->index;
  }
  for (const auto& [what, number] : found)
    text.append(" " + std::to_string(number.first) + " threads (from " + std::to_string(number.second) + ")" + what + ";");
  machine.error = text;
  _longjmp(machine.failed, 1);
}
void run_cluster() {
  struct Agent {
    uint64_t* priority;
    int kind;  // 0: a warp, 1: products, 2: a landing
    size_t block, number;
  };
  std::vector<Agent> agents;
  for (int64_t turns = 0;; turns++) {
    agents.clear();
    bool ended = true;
    for (size_t k = 0; k < machine.blocks.size(); k++) {
      Block& block = machine.blocks[k];
      ended &= block.running == 0;
      for (size_t w = 0; w < block.warps.size(); w++)
        if (block.warps[w].runnable) agents.push_back({&block.warps[w].priority, 0, k, w});
      for (size_t g = 0; g < block.groups.size(); g++) {
        WarpGroup& some = block.groups[g];
        if (some.done < int(some.products.size()) && some.products[some.done].joined == GROUP)
          agents.push_back({&some.priority, 1, k, g});
      }
    }
    for (size_t i = 0; i < machine.landings.size(); i++) agents.push_back({&machine.landings[i].priority, 2, 0, i});
    if (agents.empty() && ended) return;
    if (agents.empty()) tell_who_waits();
    if (turns > 20'000'000) fail("no end in sight");
    const Agent* chosen = &agents[draw() % agents.size()];
    if (machine.lasting) {
      for (const Agent& agent : agents)
        if (*agent.priority > *chosen->priority) chosen = &agent;
      if (draw() % machine.lasting == 0) *chosen->priority = draw();
    }
    if (chosen->kind == 0) {
      const size_t first = chosen->block * machine.threads_a_block + chosen->number * WARP, turn = draw() % WARP;
      for (size_t lane = 0; lane < WARP; lane++) {
        Thread& thread = *machine.threads[first + (lane + turn) % WARP];
        if (thread.runnable) run(thread);
      }
    } else if (chosen->kind == 1) {
      multiply(machine.blocks[chosen->block], machine.blocks[chosen->block].groups[chosen->number]);
    } else {
      const Landing landing = machine.landings[chosen->number];
      machine.landings.erase(machine.landings.begin() + chosen->number);
      land(landing);
    }
  }
}

void prepare(int first_block, int cluster, int threads, size_t shared) {
  const size_t stride = WINDOW * 2 + (shared + WINDOW - 1) / WINDOW * WINDOW;
  machine.memory.assign(stride * cluster + WINDOW, 0xff);  // NaN as bfloat16 and as float32
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(machine.memory.data()) + WINDOW - 1) & ~uintptr_t{WINDOW - 1};
  const size_t start = draw() % (WINDOW / 16) * 16;
  machine.blocks.clear();
  machine.landings.clear();
  machine.cluster = {};
  machine.threads_a_block = threads;
  while (machine.threads.size() < size_t(cluster) * threads) machine.threads.emplace_back(new Thread);
  for (auto& thread : machine.threads) thread->block = nullptr;
  for (int rank = 0; rank < cluster; rank++) {
    Block& block = machine.blocks.emplace_back();
    block.rank = rank, block.index = first_block + rank, block.running = threads;
    block.shared = reinterpret_cast<unsigned char*>(aligned) + rank * stride;
    block.start = start, block.end = start + shared;
    block.warps.resize(threads / WARP);
    block.groups.resize((threads + GROUP - 1) / GROUP);
    for (Warp& warp : block.warps) warp.priority = draw();
    for (WarpGroup& some : block.groups) some.priority = draw();
    for (int i = 0; i < threads; i++) {
      Thread& thread = *machine.threads[rank * threads + i];
      thread.block = &block, thread.index = i, thread.registers = 65536 / threads / 8 * 8;
      thread.started = thread.done = thread.fenced = thread.runnable = false;
      thread.products = 0, thread.commits.clear(), thread.sums = nullptr;
      getcontext(&thread.context);
      thread.context.uc_stack = {thread.stack.get(), 0, STACK};
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, enter, 0);
      set_runnable(thread, true);
    }
  }
}

}  // namespace

void set_seed(uint64_t seed) {
  constexpr int LASTING[3] = {0, 64, 2048};
  machine.random = seed * 0x9e3779b97f4a7c15 + 1, machine.lasting = LASTING[seed % 3];
}
const char* launch_error() { return machine.error.c_str(); }

bool launch(const std::function<void()>& kernel, int blocks, int cluster, int threads, size_t shared) {
  machine.error.clear();
  machine.current = nullptr;
  machine.kernel = &kernel, machine.grid = blocks;
  if (_setjmp(machine.failed) != 0) return false;
  if (blocks < 1 || blocks % cluster || cluster > 8 || threads % WARP || threads > 1024 || shared > 227 << 10)
    fail("%d blocks of %d threads with %zu bytes, in clusters of %d, cannot be launched", blocks, threads, shared, cluster);
  static std::vector<int> order;
  order.clear();
  for (int first = 0; first < blocks; first += cluster) order.push_back(first);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  for (int first : order) {
    prepare(first, cluster, threads, shared);
    run_cluster();
  }
  return true;
}

unsigned thread_index() { return self().index; }
unsigned block_index() { return here().index; }
unsigned grid_size() { return machine.grid; }
uint32_t cluster_rank() { return here().rank; }
void* dynamic_shared() { return here().shared + here().start; }
uint32_t shared_address(const void* pointer) {
  const ptrdiff_t at = static_cast<const unsigned char*>(pointer) - here().shared;
  if (at < ptrdiff_t(here().start) || at > ptrdiff_t(here().end)) fail("a pointer into shared memory points elsewhere");
  return static_cast<uint32_t>(at);
}

void touch(const void* place, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(place) % bytes) fail("an access of %zu bytes is not aligned", bytes);
  maybe_yield();
}
void meet_warp() { meet(here().warps[self().index / WARP].meeting, WARP, "__syncwarp"); }
void meet_block(int barrier, int threads) {
  meet(here().meetings[barrier], threads ? threads : machine.threads_a_block, barrier ? "bar.sync" : "__syncthreads");
}
void meet_cluster() {
  meet(machine.cluster, machine.threads_a_block * int(machine.blocks.size()), "the cluster's barrier");
}
void set_registers(int count, bool more) {
  const int change = count - self().registers;
  if (more ? change < 0 : change > 0) fail("setmaxnreg from %d to %d", self().registers, count);
  while (here().free_registers < change) park(here().for_registers, "registers");
  here().free_registers -= change;
  self().registers = count;
  if (change < 0) wake(here().for_registers);
}

void init_barrier(uint64_t* word, int arrivals, const char* name) {
  const uint32_t at = shared_address(word);
  Barrier& barrier = here().barriers[at];
  if (barrier.count || at % 8 || arrivals < 1) fail("barrier %s cannot be initialised here, or was before", name);
  int same = 1;
  for (const auto& [_, other] : here().barriers) same += other.name.rfind(std::string(name) + " no. ", 0) == 0;
  barrier.name = std::string(name) + " no. " + std::to_string(same);
  barrier.count = barrier.pending = arrivals;
  const uint64_t cookie = COOKIE | at;
  memcpy(word, &cookie, 8);
}
void arrive(uint64_t* word, uint32_t rank) {
  maybe_yield();
  Barrier& barrier = barrier_at(peer(rank), shared_address(word));
  if (barrier.pending == 0) fail("%s: more than %d arrivals in a phase", barrier.name.c_str(), barrier.count);
  barrier.pending--;
  settle(barrier);
}
void expect_bytes(uint64_t* word, uint32_t bytes) {
  barrier_at(here(), shared_address(word)).bytes += bytes;
  arrive(word, cluster_rank());
}
void wait(uint64_t* word, uint32_t parity) {
  if (parity > 1) fail("a parity is 0 or 1, not %u", parity);
  for (;;) {
    Barrier& barrier = barrier_at(here(), shared_address(word));
    if ((barrier.phase & 1) != parity) return;
    const auto text = [](int64_t number) { return std::to_string(number); };
    park(barrier.waiting, barrier.name + ", parity " + text(parity) + " (phase " + text(barrier.phase) + " lacks " +
                              text(barrier.pending) + " arrivals and " + text(barrier.bytes) + " bytes)");
  }
}
void copy(void* to, const Map& map, int column, int row, uint64_t* word, unsigned blocks) {
  const uint32_t at = shared_address(to), barrier = shared_address(word), bytes = map.box_rows * map.box_columns * 2;
  if (at % 128 || at + bytes > here().end) fail("a box of %u bytes does not fit at byte %u", bytes, at);
  for (uint32_t rank = 0; blocks >> rank; rank++) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = peer(rank);
    barrier_at(block, barrier);
    if (read_by_products(block, at, at + bytes)) {
      fail("a copy begins into what running products read, block %u", block.index);
    }
    const int half = map.box_rows / 2;  // it comes in pieces
    if (half) machine.landings.push_back({map, column, row, 0, half, &block, at, barrier, draw()});
    machine.landings.push_back({map, column, row, half, map.box_rows, &block, at, barrier, draw()});
  }
  maybe_yield();
}
void load_remote(void* to, uint32_t address, uint32_t rank, size_t bytes) {
  maybe_yield();
  const Block& block = peer(rank);
  if (block.running == 0) fail("shared memory is read of block %u, which has ended", block.index);
  if (address % bytes || address + bytes > block.end) fail("a read of %zu bytes at byte %u", bytes, address);
  memcpy(to, block.shared + address, bytes);
}

void store_shared(uint32_t address, const void* from, size_t bytes) {
  if (address % bytes || address < here().start || address + bytes > here().end) {
    fail("a write of %zu bytes at byte %u", bytes, address);
  }
  memcpy(here().shared + address, from, bytes);
}

void fence_registers() { self().fenced = true; }
void registers_written() { self().fenced = false; }
void product(float* sums, int count, const Operand& a, const uint32_t* left, const Operand& b, bool add) {
  maybe_yield();
  Thread& thread = self();
  WarpGroup& g = group();
  if (!thread.fenced) fail("a product without a fence after its registers were written or its sums read");
  if (thread.products == int(g.products.size())) {
    Product& p = g.products.emplace_back();
    p.a = a, p.b = b, p.add = add, p.count = count, p.of_registers = left != nullptr;
    for (const Landing& l : machine.landings) {
      const uint32_t from = l.at + l.first * l.map.box_columns * 2, to = l.at + l.last * l.map.box_columns * 2;
      if (l.to == &here() && read_by_products(here(), from, to)) fail("a product of what is still being copied");
    }
  }
  Product& p = g.products[thread.products++];
  if (p.a.address != a.address || p.b.address != b.address || p.add != add || p.count != count) {
    fail("threads of a warp group ask for different products");
  }
  if (b.address % 16 || a.address % 16) fail("a product's tile is not on 16 bytes");
  p.left[thread.index % GROUP] = left;
  if (thread.sums == nullptr) {
    memcpy(g.sums[thread.index % GROUP], sums, count * sizeof(float));
    for (int i = 0; i < count; i++) memcpy(sums + i, &POISON, 4);
    thread.sums = sums, thread.count = count;
  } else if (thread.sums != sums || thread.count != count) {
    fail("products of different sums at once, which this emulation does not do");
  }
  p.joined++;
}
void commit_products() { self().commits.push_back(self().products); }
void finish_products(int pending) {
  Thread& thread = self();
  WarpGroup& g = group();
  const int groups = static_cast<int>(thread.commits.size());
  const int target = groups > pending ? thread.commits[groups - 1 - pending] : 0;
  while (g.done < target) park(g.waiting, "products");
  g.retired = std::max(g.retired, target);
  thread.fenced = false;
  if (thread.sums && target == thread.products) {
    uint32_t bits;
    for (int i = 0; i < thread.count; i++) {
      memcpy(&bits, thread.sums + i, 4);
      if (bits != POISON) fail("sums were written while products run");
    }
    memcpy(thread.sums, g.sums[thread.index % GROUP], thread.count * sizeof(float));
    thread.sums = nullptr;
  }
}
void load_matrices(uint32_t* to, uint32_t address) {
  Warp& warp = here().warps[self().index / WARP];
  const int lane = self().index % WARP;
  uint32_t* addresses = warp.addresses[warp.side[lane]++ % 2];
  if (address % 16 || address + 16 > here().end) fail("a row of 16 bytes at byte %u", address);
  addresses[lane] = address;
  meet(warp.meeting, WARP, "ldmatrix");
  for (int i = 0; i < 4; i++) memcpy(to + i, here().shared + addresses[8 * i + lane / 4] + lane % 4 * 4, 4);
  self().fenced = false;
}

}  // namespace emulation
