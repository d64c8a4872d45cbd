// peerlane.h is C++ as well, and ranks may have a thread each.
//
// host/tests/c_interface.rs compiles this as C++17, links it with libpeerlane.so and runs it. Exit
// status 0: all is right; else the number of the step that is not.

#include "peerlane.h"

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

struct destroy {
    void operator()(peerlane_comm *comm) const { peerlane_comm_destroy(comm); }
    void operator()(peerlane_gpu *gpu) const { peerlane_gpu_close(gpu); }
};
using gpu_handle = std::unique_ptr<peerlane_gpu, destroy>;
using comm_handle = std::unique_ptr<peerlane_comm, destroy>;

constexpr int WORLD = 3;
constexpr int COUNT = 500;

struct group {
    std::vector<gpu_handle> gpus;
    std::vector<comm_handle> comms;
};

// An empty group if anything fails.
group connect() {
    group made;
    std::vector<peerlane_gpu *> gpus;
    for (int rank = 0; rank < WORLD; rank++) {
        peerlane_gpu *gpu = nullptr;
        const std::string name = "sim:" + std::to_string(rank) + "/" + std::to_string(WORLD);
        if (peerlane_gpu_open(name.c_str(), &gpu) != PEERLANE_OK) return {};
        gpus.push_back(gpu);
        made.gpus.emplace_back(gpu);
    }
    peerlane_config config;
    if (peerlane_config_init(&config, sizeof config) != PEERLANE_OK) return {};
    config.deadline_ms = 60000;
    config.mailbox_bytes = 4 << 20;
    config.max_blocks = 2;
    peerlane_comm *comms[WORLD];
    if (peerlane_connect(gpus.data(), WORLD, &config, comms) != PEERLANE_OK) return {};
    for (peerlane_comm *comm : comms) made.comms.emplace_back(comm);
    return made;
}

// A rank's whole life in its own thread: the sum of what all ranks bring, some times over.
bool lives(peerlane_gpu *gpu, peerlane_comm *comm, int rank) {
    void *tensor = nullptr;
    if (peerlane_gpu_alloc(gpu, COUNT * sizeof(float), &tensor) != PEERLANE_OK) return false;
    bool right = true;
    for (int round = 0; round < 5 && right; round++) {
        std::vector<float> data(COUNT, static_cast<float>(rank + round));
        const size_t bytes = data.size() * sizeof(float);
        right = peerlane_gpu_upload(gpu, tensor, data.data(), bytes, nullptr) == PEERLANE_OK
            && peerlane_all_reduce(comm, tensor, tensor, COUNT, PEERLANE_F32, PEERLANE_SUM,
                                   nullptr, nullptr) == PEERLANE_OK
            && peerlane_barrier(comm, nullptr) == PEERLANE_OK
            && peerlane_comm_synchronize(comm, nullptr) == PEERLANE_OK
            && peerlane_gpu_download(gpu, data.data(), tensor, bytes, nullptr) == PEERLANE_OK;
        const float wanted = WORLD * (WORLD - 1) / 2 + WORLD * round;
        for (const float found : data) right = right && found == wanted;
    }
    right = peerlane_comm_close(comm) == PEERLANE_OK && right;
    return peerlane_gpu_free(gpu, tensor) == PEERLANE_OK && right;
}

bool ranks_live_in_threads() {
    const group made = connect();
    if (made.comms.empty()) return false;
    bool right[WORLD] = {};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < WORLD; rank++) {
        threads.emplace_back([&made, &right, rank] {
            right[rank] = lives(made.gpus[rank].get(), made.comms[rank].get(), rank);
        });
    }
    for (std::thread &thread : threads) thread.join();
    return right[0] && right[1] && right[2];
}

// A thread that waits for ranks that never come is freed by another, with the same handle.
bool an_abort_frees_who_waits() {
    const group made = connect();
    if (made.comms.empty()) return false;
    peerlane_comm *comm = made.comms[0].get();
    peerlane_status ended = PEERLANE_OK;
    std::string reason;
    std::thread waits([&] {
        if (peerlane_barrier(comm, nullptr) != PEERLANE_OK) return;
        ended = peerlane_comm_synchronize(comm, nullptr);
        reason = peerlane_last_error();
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const bool aborted = peerlane_comm_abort(comm) == PEERLANE_OK;
    waits.join();
    return aborted && ended == PEERLANE_ABORTED && reason.find("rank 0") != std::string::npos
        && std::string(peerlane_last_error()).empty();
}

}  // namespace

int main() {
    if (!ranks_live_in_threads()) return 1;
    if (!an_abort_frees_who_waits()) return 2;
    return 0;
}
