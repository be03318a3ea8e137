// Time of the update on one rank of N, as sharding leaves it: what the busiest rank owns, computed here alone
// with all the cores, beside 1/N of the whole. The other ranks are pretended: nothing is exchanged.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "dev/hidden_matrices.h"
#include "setup.h"

namespace {
constexpr int kSteps = 5;

/// One of N ranks whose exchanges take no time.
class Pretended final : public Comm {
 public:
  Pretended(int rank, int size) : Comm(rank, size) {}
};

int busiest(const Owners& owners) {
  int rank = 0;
  for (int r = 1; r < owners.ranks(); ++r)
    if (owners.work(r) > owners.work(rank)) rank = r;
  return rank;
}

void bench(Context& ctx, const std::string& model, const std::string& rule, const std::vector<int>& ranks) {
  fmt::print("update of the hidden matrices of {}, {}, {}; the busiest rank, mean of {} steps\n", model, rule,
             describe_device(ctx), kSteps);
  fmt::print("  {:>5} {:>9} {:>9} {:>9} {:>10}\n", "ranks", "GFLOP", "imbalance", "ms", "ms x N / 1");
  double alone = 0;
  for (const int N : ranks) {
    ctx.comm = std::make_shared<Pretended>(0, N);
    const Owners owners = HiddenMatrices(ctx, model, rule).optimizer.owners();
    ctx.comm = std::make_shared<Pretended>(busiest(owners), N);
    HiddenMatrices run(ctx, model, rule);
    run.seconds(0, 1);  // warms up
    const double seconds = run.seconds(1, kSteps);
    if (alone == 0) alone = seconds * N;
    fmt::print("  {:>5} {:>9.2f} {:>9.3f} {:>9.2f} {:>10.2f}\n", N, owners.work(ctx.comm->rank()) / 1e9,
               owners.imbalance(), 1e3 * seconds, seconds * N / alone);
    std::fflush(stdout);
  }
  ctx.comm = std::make_shared<Comm>();
}
}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> models = {"gpt2-small"};
  std::vector<int> ranks = {1, 2, 3, 4, 8};
  std::string rule = "muon";
  MachineOptions machine;
  CLI::App app("Time of the update on one rank of N.", "bench_ranks");
  app.add_option("--model", models, "presets");
  app.add_option("--ranks", ranks, "numbers of ranks, beginning with 1");
  app.add_option("--rule", rule, "RULE[:key=value,...]");
  app.add_option("--threads", machine.threads);
  CLI11_PARSE(app, argc, argv);
  Context ctx;
  machine.device = "cpu";
  use_device(ctx, machine);
  for (const std::string& model : models) bench(ctx, model, rule, ranks);
  return 0;
}
