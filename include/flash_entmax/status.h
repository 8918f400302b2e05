// Errors as values: what every function that can fail returns.

#ifndef FLASH_ENTMAX_STATUS_H_
#define FLASH_ENTMAX_STATUS_H_

#include <string>
#include <utility>
#include <variant>

namespace flash_entmax {

// What kind of failure a Status reports.
enum class StatusCode {
  kOk = 0,
  kInvalidArgument,  // The caller passed something no engine could accept.
  kUnimplemented,    // Valid, but the engine that was asked for cannot do it.
  kOutOfMemory,      // Memory ran out; nothing was written.
  kIo,               // A file could not be read or written.
  kDevice,           // The GPU is missing, too old, or reported a failure.
};

// Success, or a failure with a one-line message that names the argument, its value and what is
// allowed, as in "alpha: got -1; must be finite and > 0".
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status Ok() { return {}; }
  static Status InvalidArgument(std::string message) {
    return {StatusCode::kInvalidArgument, std::move(message)};
  }
  static Status Unimplemented(std::string message) {
    return {StatusCode::kUnimplemented, std::move(message)};
  }
  static Status OutOfMemory(std::string message) {
    return {StatusCode::kOutOfMemory, std::move(message)};
  }
  static Status Io(std::string message) { return {StatusCode::kIo, std::move(message)}; }
  static Status Device(std::string message) { return {StatusCode::kDevice, std::move(message)}; }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// A value, or the Status that says why there is none. Ask ok() before value().
template <typename T>
class [[nodiscard]] Expected {
 public:
  Expected(T value) : state_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Expected(Status status) : state_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return std::holds_alternative<T>(state_); }
  const T& value() const& { return std::get<T>(state_); }
  T& value() & { return std::get<T>(state_); }
  T&& value() && { return std::get<T>(std::move(state_)); }
  const T& operator*() const& { return value(); }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  const T* operator->() const { return &value(); }
  T* operator->() { return &value(); }
  Status status() const { return ok() ? Status::Ok() : std::get<Status>(state_); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_STATUS_H_
