// A step's routes as one int32 tensor: [P, experts of P_max pairs, their tokens, bits of their weights].
//
// Pairs are sorted by expert, so that an expert's tokens lie together. P_max follows from the number of
// tokens alone: compiled graphs see a fixed shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace alter {

class Routes {
 public:
  explicit Routes(const at::Tensor& plan)
      : data_(plan.const_data_ptr<int32_t>()), capacity_((plan.numel() - 1) / 3) {}

  int64_t size() const { return data_[0]; }
  int64_t expert(int64_t pair) const { return data_[1 + pair]; }
  int64_t token(int64_t pair) const { return data_[1 + capacity_ + pair]; }
  float weight(int64_t pair) const {
    float weight;
    std::memcpy(&weight, data_ + 1 + 2 * capacity_ + pair, sizeof weight);
    return weight;
  }

 private:
  const int32_t* data_;
  int64_t capacity_;
};

}  // namespace alter
