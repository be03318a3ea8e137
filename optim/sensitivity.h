// The sensitivities s_l of the modular norm max_l s_l ||W_l||_l (Proposition 7 of arXiv 2409.20325): a tensor
// of sensitivity s moves by 1 / s of the common step. They come from three places, the later ones multiplied
// in:
//
//   a rule's key s                          --hidden muon:s=2
//   masses, as in modular duality           --sensitivity masses:embedding=1,hidden=5
//   a name pattern                          --sensitivity 'h.0.*=2', as often as wanted; those that match
//   multiply
//
// Masses (Large et al., arXiv 2405.14813): a mass is the share of the network's change that a part is
// granted, and
//
//   1 / s_l = (m_l / m_total) / (what a change of W_l's output is multiplied by before it reaches the output)
//
// The key of a role is the mass of all its tensors together: the default is embedding=0.5, position=0.5,
// hidden=5, head=1, vector=1, scalar=1, those that the model has. It is shared equally among the role's
// matrices (a fused q, k, v counts as three), or vectors. GPT-2 adds every branch to the residual stream with
// coefficient 1, so a change reaches the output unscaled: residual=1. A network that mixes x + f(x) / (2 L)
// would say residual=1/(2L), and then sensitivities no longer depend on depth; qkv is such a coefficient for
// q, k and v alone (1/3 in modula). LayerNorm stands before every branch and the head, so that the
// embedding's scale reaches no further.
//
// Tied weights: GPT-2's token embedding is also its head. As an input its natural norm is l1->RMS, as an
// output RMS->linf; the modular norm would be the larger of the two, whose dual vector has no closed form. We
// give a tied tensor the embedding's role, rule and mass, and add the head's mass to it because both uses
// move it. With --model NAME:tied=0 each has its own role, rule and mass.
#pragma once

#include <string>
#include <vector>

#include "model/parameters.h"

/// True when `pattern` (with * and ? as in file names) is the tensor's name, with or without its last
/// ".weight": h.*.mlp.c_proj means h.0.mlp.c_proj.weight, and not the bias.
bool name_matches(const std::string& pattern, const std::string& name);

/// The sensitivity of every row of `table` from texts like those above, without the rules' own keys.
/// UsageError for bad syntax, a value that is not positive, or a pattern that matches nothing.
std::vector<double> read_sensitivities(const std::vector<std::string>& texts, const ParameterTable& table);
