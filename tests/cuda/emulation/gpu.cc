#include "emulation/gpu.h"

#include <ucontext.h>

#include <array>
#include <cstdio>
#include <memory>
#include <vector>

namespace flash_entmax::testing {
namespace {

constexpr size_t kStackBytes = size_t{256} * 1024;
constexpr int kMostWarps = 32;

// Threads that wait for each other.
struct Meeting {
  int arrived = 0;
  size_t bytes = 0;    // that each gives
  int64_t number = 0;  // of those that have ended
  int value = 0;
  int result = 0;
  std::vector<char> given, received;
};

struct Copy {
  void* destination;
  const void* source;
  size_t bytes;

  void Do() const {
    if (source != nullptr) {
      std::memcpy(destination, source, bytes);
    } else {
      std::memset(destination, 0, bytes);
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Place place;
  bool done = false;
  const Meeting* meeting = nullptr;  // it waits for the end of this one, of that number
  int64_t number = 0;
  std::vector<Copy> copies;    // started, not done
  std::vector<size_t> groups;  // for each commit, how many of them it ends

  bool CanRun() const { return !done && (meeting == nullptr || meeting->number != number); }
};

struct Block {
  ucontext_t caller;
  std::vector<Fiber> fibers;
  std::array<Meeting, kMostWarps> warps;
  Meeting all;
  const std::function<void()>* kernel = nullptr;
  size_t current = 0;

  Fiber& fiber() { return fibers[current]; }
  void Await(const Meeting& meeting, int64_t number);
  void RunNext();
};

Block* running = nullptr;
char* shared_base = nullptr;
size_t shared_size = 0;

[[noreturn]] void Stop(const char* why) {
  std::fprintf(stderr, "emulated thread %u of block %u: %s\n", CurrentPlace().thread.x,
               CurrentPlace().block.x, why);
  std::abort();
}

void Block::Await(const Meeting& meeting, int64_t number) {
  if (meeting.number != number) return;
  fiber().meeting = &meeting;
  fiber().number = number;
  RunNext();
}

// Returns when it is this fiber's turn again; after the last one the block is done.
void Block::RunNext() {
  Fiber& own = fiber();
  for (size_t i = 0; i < fibers.size(); ++i) {
    current = current + 1 < fibers.size() ? current + 1 : 0;
    if (!fiber().CanRun()) continue;
    if (&fiber() != &own) swapcontext(&own.context, &fiber().context);
    return;
  }
  for (current = 0; current < fibers.size(); ++current) {
    if (!fiber().done) Stop("waits for threads that do not come");
  }
  setcontext(&caller);
}

void Enter() {
  (*running->kernel)();
  running->fiber().done = true;
  running->RunNext();
}

}  // namespace

Place& CurrentPlace() { return running->fiber().place; }

void RunBlock(int block, int threads, const std::function<void()>& kernel) {
  Block state;
  state.kernel = &kernel;
  state.fibers.resize(static_cast<size_t>(threads));
  running = &state;
  for (size_t i = 0; i < state.fibers.size(); ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.place = {{static_cast<unsigned>(i)},
                   {static_cast<unsigned>(block)},
                   {static_cast<unsigned>(threads)}};
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, Enter, 0);
  }
  swapcontext(&state.caller, &state.fibers[0].context);
  running = nullptr;
}

void GatherWarp(const void* own, size_t bytes, void* all) {
  const unsigned thread = CurrentPlace().thread.x;
  Meeting& meeting = running->warps[thread / 32];
  if (meeting.arrived == 0) {
    meeting.bytes = bytes;
    meeting.given.resize(32 * bytes);
  }
  if (meeting.bytes != bytes) Stop("lanes meet at different instructions");
  std::memcpy(meeting.given.data() + thread % 32 * bytes, own, bytes);
  const int64_t number = meeting.number;
  if (++meeting.arrived == 32) {
    meeting.arrived = 0;
    meeting.received = meeting.given;
    ++meeting.number;
  }
  running->Await(meeting, number);
  // The next meeting cannot end before this thread has come to it.
  std::memcpy(all, meeting.received.data(), 32 * bytes);
}

int OrOfBlock(int value) {
  Meeting& meeting = running->all;
  meeting.value |= value;
  const int64_t number = meeting.number;
  if (++meeting.arrived == static_cast<int>(running->fibers.size())) {
    meeting.arrived = 0;
    meeting.result = meeting.value;
    meeting.value = 0;
    ++meeting.number;
  }
  running->Await(meeting, number);
  return meeting.result;
}

void SetSharedMemory(void* base, size_t bytes) {
  shared_base = static_cast<char*>(base);
  shared_size = bytes;
}

uint32_t SharedOffset(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - shared_base;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(shared_size)) {
    Stop("an address that is not in shared memory");
  }
  return static_cast<uint32_t>(offset);
}

void* SharedAt(uint32_t address, size_t bytes) {
  if (address + bytes > shared_size) Stop("an access beyond shared memory");
  if (address % bytes != 0) Stop("a misaligned access to shared memory");
  return shared_base + address;
}

void StartCopy(void* destination, const void* source, size_t bytes) {
  const Copy copy{destination, source, bytes};
  if (CurrentPlace().block.x % 2 == 0) {
    copy.Do();
  } else {
    running->fiber().copies.push_back(copy);
  }
}

void CommitCopies() {
  Fiber& fiber = running->fiber();
  fiber.groups.push_back(fiber.copies.size());
}

void WaitCopies(size_t pending) {
  Fiber& fiber = running->fiber();
  if (fiber.groups.size() <= pending) return;
  const auto first_pending = fiber.groups.end() - static_cast<ptrdiff_t>(pending);
  const size_t done = first_pending[-1];
  for (size_t i = 0; i < done; ++i) fiber.copies[i].Do();
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(done));
  fiber.groups.erase(fiber.groups.begin(), first_pending);
  for (size_t& end : fiber.groups) end -= done;
}

}  // namespace flash_entmax::testing
