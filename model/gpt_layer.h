// The parameters of one layer of GPT-2, looked up by name once; for gpt.cpp and gpt_memory.cpp alone.
#pragma once

#include <string>

#include "model/gpt.h"

/// y = x W^T + b; W (out, in)
struct Linear {
  Parameter& weight;
  Parameter& bias;
};

/// gain and bias of a layernorm
struct Affine {
  Parameter& gain;
  Parameter& bias;
};

struct Gpt::Layer {
  Affine ln1;
  Linear qkv, proj;
  Affine ln2;
  Linear fc, fc_proj;

  Layer(ParameterTable& table, const std::string& h)
      : ln1{table.at(h + "ln_1.weight"), table.at(h + "ln_1.bias")},
        qkv{table.at(h + "attn.c_attn.weight"), table.at(h + "attn.c_attn.bias")},
        proj{table.at(h + "attn.c_proj.weight"), table.at(h + "attn.c_proj.bias")},
        ln2{table.at(h + "ln_2.weight"), table.at(h + "ln_2.bias")},
        fc{table.at(h + "mlp.c_fc.weight"), table.at(h + "mlp.c_fc.bias")},
        fc_proj{table.at(h + "mlp.c_proj.weight"), table.at(h + "mlp.c_proj.bias")} {}
};
