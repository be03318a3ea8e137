#include "optim/recipe.h"

#include <vector>

#include "error.h"
#include "keyed.h"

namespace {
constexpr Recipe kRecipes[] = {
    {.name = "muon",
     .help = "Muon on hidden matrices, Adam elsewhere (the default)",
     .hidden = "muon:lr=0.02,momentum=0.95,wd=0.01",
     .embedding = "adam:lr=0.003,beta1=0.9,beta2=0.95",
     .position = "adam:lr=0.003,beta1=0.9,beta2=0.95",
     .head = "adam:lr=0.003,beta1=0.9,beta2=0.95",
     .vector = "adam:lr=0.003,beta1=0.8,beta2=0.95,eps=1e-10",
     .scalar = "adam:lr=0.003,beta1=0.8,beta2=0.95,eps=1e-10",
     .schedule = "wsd:cooldown=0.6",
     .grad_clip = 0},
    {.name = "adamw",
     .help = "the classic baseline: AdamW everywhere, decay on matrices only",
     .hidden = "adam:lr=0.001,beta1=0.9,beta2=0.95,wd=0.1",
     .embedding = "adam:lr=0.001,beta1=0.9,beta2=0.95,wd=0.1",
     .position = "adam:lr=0.001,beta1=0.9,beta2=0.95,wd=0.1",
     .head = "adam:lr=0.001,beta1=0.9,beta2=0.95,wd=0.1",
     .vector = "adam:lr=0.001,beta1=0.9,beta2=0.95",
     .scalar = "adam:lr=0.001,beta1=0.9,beta2=0.95",
     .schedule = "cosine:warmup=50,final=0.1",
     .grad_clip = 1},
    {.name = "modular",
     .help = "a norm for every role: RMS->RMS hidden, l1->RMS embeddings, sign for vectors",
     .hidden = "muon:lr=0.02,momentum=0.95,scale=rms",
     .embedding = "colnorm:lr=0.02,momentum=0.9",
     .position = "colnorm:lr=0.02,momentum=0.9",
     .head = "rownorm:lr=0.02,momentum=0.9",
     .vector = "signum:lr=0.002,beta=0.9",
     .scalar = "signum:lr=0.002,beta=0.9",
     .schedule = "wsd:cooldown=0.6",
     .grad_clip = 0},
    // Radii of the paper's GPT-2 124M: 50 for hidden matrices, 3000 sign(d) / in for the head, which also was
    // its embedding and so moved by 3000 / 768 = 4 times the rate in every entry. Vectors are not
    // constrained: a ball about 0 is no place for gains that begin at 1.
    {.name = "scion",
     .help = "Scion: steps inside of balls, RMS->RMS hidden, sign for embeddings and head",
     .hidden = "scion:lr=0.00036,radius=50,constrained=1",
     .embedding = "scion:lr=0.00036,radius=4,norm=l1-linf,constrained=1",
     .position = "scion:lr=0.00036,radius=4,norm=l1-linf,constrained=1",
     .head = "scion:lr=0.00036,radius=3000,norm=scaled-l1-linf,constrained=1",
     .vector = "scion:lr=0.00036,radius=10",
     .scalar = "scion:lr=0.00036,radius=10",
     .schedule = "wsd:cooldown=0.28",
     .grad_clip = 0},
    {.name = "prodigy",
     .help = "Prodigy everywhere: no learning rate to choose",
     .hidden = "prodigy",
     .embedding = "prodigy",
     .position = "prodigy",
     .head = "prodigy",
     .vector = "prodigy",
     .scalar = "prodigy",
     .schedule = "cosine",
     .grad_clip = 0},
};
}  // namespace

std::span<const Recipe> recipe_table() {
  return kRecipes;
}

OptimizerOptions recipe_options(const std::string& name) {
  std::vector<std::string> names;
  for (const Recipe& recipe : kRecipes) {
    names.push_back(recipe.name);
    if (name != recipe.name) continue;
    OptimizerOptions options{.rules = {{Role::hidden, recipe.hidden},
                                       {Role::embedding, recipe.embedding},
                                       {Role::position, recipe.position},
                                       {Role::head, recipe.head},
                                       {Role::vector, recipe.vector},
                                       {Role::scalar, recipe.scalar}}};
    options.schedule = parse_schedule("--schedule", recipe.schedule);
    options.grad_clip = recipe.grad_clip;
    return options;
  }
  Keyed("--recipe", name).unknown_name(names);
}
