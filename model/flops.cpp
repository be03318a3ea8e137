#include "model/flops.h"

double train_flops_per_token(const ModelConfig& config, int64_t T) {
  const auto L = static_cast<double>(config.L), C = static_cast<double>(config.C);
  const double weights = 12.0 * L * C * C + static_cast<double>(config.V) * C;
  return 6.0 * weights + 6.0 * L * C * static_cast<double>(T);
}

double train_bytes_per_token(const ModelConfig& config, DType dtype) {
  const auto L = static_cast<double>(config.L), C = static_cast<double>(config.C);
  return static_cast<double>(dtype_bytes(dtype)) *
         (18.0 * L * C + 2.0 * static_cast<double>(config.padded_V()));
}

double floor_seconds(const ModelConfig& config, int64_t T, DType dtype, int64_t tokens,
                     const MachineRates& rates) {
  return static_cast<double>(tokens) * (train_flops_per_token(config, T) / rates.flops +
                                        train_bytes_per_token(config, dtype) / rates.memory.bytes);
}
