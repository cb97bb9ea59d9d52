#include "bench/cli/scratch_folder.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

constexpr std::array<int, 3> kStops = {SIGINT, SIGTERM, SIGHUP};

// What a signal handler may read: paths that outlive the folder, the last of them its own.
constexpr size_t kMostPaths = 4;
std::array<std::atomic<const char*>, kMostPaths> to_remove;

void RemoveAll() {
  for (std::atomic<const char*>& path : to_remove) {
    const char* const text = path.exchange(nullptr);
    if (text != nullptr && unlink(text) != 0) rmdir(text);
  }
}

void Stop(int signal) {
  RemoveAll();
  std::signal(signal, SIG_DFL);
  raise(signal);
}

}  // namespace

ScratchFolder::ScratchFolder(const std::string& directory, const std::vector<std::string>& files) {
  std::string folder = directory + "/vattn-scratch-XXXXXX";
  // A signal waits until there is something that it finds.
  sigset_t stops, before;
  sigemptyset(&stops);
  for (const int signal : kStops) sigaddset(&stops, signal);
  pthread_sigmask(SIG_BLOCK, &stops, &before);
  const bool made = mkdtemp(folder.data()) != nullptr;
  const int error = errno;
  if (made) Register(folder, files);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!made) throw Failure("cannot make a folder in " + directory + ": " + std::strerror(error));
}

void ScratchFolder::Register(const std::string& folder, const std::vector<std::string>& files) {
  for (const std::string& file : files) paths_.push_back(folder + "/" + file);
  paths_.push_back(folder);
  for (size_t i = 0; i < paths_.size(); ++i) to_remove.at(i) = paths_[i].c_str();
  for (const int signal : kStops) {
    // Whoever starts the command with a signal ignored, as nohup does, wants it to go on.
    if (std::signal(signal, Stop) == SIG_IGN) std::signal(signal, SIG_IGN);
  }
}

ScratchFolder::~ScratchFolder() {
  RemoveAll();
  for (const int signal : kStops) {
    if (std::signal(signal, SIG_DFL) == SIG_IGN) std::signal(signal, SIG_IGN);
  }
}

}  // namespace vattn::bench
