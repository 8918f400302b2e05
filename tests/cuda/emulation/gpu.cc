#include "emulation/gpu.h"

#include <ucontext.h>

#include <array>
#include <memory>
#include <vector>

namespace flash_entmax::testing {
namespace {

constexpr size_t kStackBytes = size_t{256} * 1024;
constexpr int kMostWarps = 32;

// Threads that wait for each other.
struct Meeting {
  int arrived = 0;
  int64_t number = 0;  // of those that have ended
  int value = 0;
  int result = 0;
  std::vector<char> given, received;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Place place;
  bool done = false;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::array<Meeting, kMostWarps> warps;
  Meeting all;
  const std::function<void()>* kernel = nullptr;
  size_t current = 0;

  Fiber& fiber() { return fibers[current]; }
  void Yield() { swapcontext(&fiber().context, &scheduler); }
  void Await(const Meeting& meeting, int64_t number) {
    while (meeting.number == number) Yield();
  }
};

Block* running = nullptr;

void Enter() {
  (*running->kernel)();
  running->fiber().done = true;
  running->Yield();
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
  for (bool left = true; left;) {
    left = false;
    for (state.current = 0; state.current < state.fibers.size(); ++state.current) {
      if (state.fiber().done) continue;
      left = true;
      swapcontext(&state.scheduler, &state.fiber().context);
    }
  }
  running = nullptr;
}

void GatherWarp(const void* own, size_t bytes, void* all) {
  const unsigned thread = CurrentPlace().thread.x;
  Meeting& meeting = running->warps[thread / 32];
  if (meeting.given.size() < 32 * bytes) meeting.given.resize(32 * bytes);
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

}  // namespace flash_entmax::testing
