// Several runs may train in one process, each on a thread and a stream of its own, so that small
// kernels of one fill what those of another leave idle. Capturing a graph is the one thing that
// tolerates no company: a capture holds this lock alone, whatever else allocates, copies or
// launches on a device holds it shared. Waiting for a stream needs no lock.

#ifndef FLASH_ENTMAX_LAB_DEVICE_LOCK_H_
#define FLASH_ENTMAX_LAB_DEVICE_LOCK_H_

#include <mutex>
#include <shared_mutex>

namespace flash_entmax::lab {

inline std::shared_mutex& DeviceMutex() {
  static std::shared_mutex mutex;
  return mutex;
}

class DeviceInCompany {
 private:
  std::shared_lock<std::shared_mutex> lock_{DeviceMutex()};
};

class DeviceAlone {
 private:
  std::unique_lock<std::shared_mutex> lock_{DeviceMutex()};
};

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_DEVICE_LOCK_H_
