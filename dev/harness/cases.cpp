#include "dev/harness/cases.h"

#include <charconv>
#include <fstream>
#include <functional>
#include <set>
#include <stdexcept>

#include "tests/op_cases.h"

namespace {
/// "B=4,T=1024,in_place" taken apart; what nobody asked for is an error at the end.
class Sizes {
 public:
  explicit Sizes(const std::string& text) : text_(text) {
    for (size_t start = 0; start < text.size();) {
      const size_t end = std::min(text.find(',', start), text.size());
      const std::string part = text.substr(start, end - start);
      const size_t equals = part.find('=');
      if (equals == std::string::npos)
        words_.insert(part);
      else
        numbers_[part.substr(0, equals)] = number(part.substr(equals + 1));
      start = end + 1;
    }
  }
  bool has(const std::string& key) const { return numbers_.contains(key); }
  int64_t operator[](const std::string& key) {
    if (!has(key)) throw std::runtime_error("no size " + key + ", '" + text_ + "', add " + key + "=NUMBER");
    used_.insert(key);
    return numbers_.at(key);
  }
  int64_t get(const std::string& key, int64_t otherwise) { return has(key) ? (*this)[key] : otherwise; }
  bool word(const std::string& name) {
    used_.insert(name);
    return words_.contains(name);
  }
  Orientation orientation() {
    for (const Orientation o : {kNN, kNT, kTN, kTT})
      if (word(o.name())) return o;
    return kNN;
  }
  void expect_all_used() const {
    for (const std::string& word : words_) expect_used(word);
    for (const auto& [key, value] : numbers_) expect_used(key);
  }

 private:
  int64_t number(const std::string& text) const {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > int64_t{1} << 40)
      throw std::runtime_error("'" + text + "' is no size, '" + text_ + "', give a number");
    return value;
  }
  void expect_used(const std::string& key) const {
    if (!used_.contains(key))
      throw std::runtime_error("unknown size or word '" + key + "', '" + text_ + "', see --list");
  }
  std::string text_;
  std::map<std::string, int64_t> numbers_;
  std::set<std::string> words_, used_;
};

/// The candidate, or the door when there is none.
template <typename Args>
Op<Args> pick(const AnyOp* candidate, Op<Args> door) {
  return candidate != nullptr ? std::get<Op<Args>>(*candidate) : door;
}

struct Maker {
  OpHelp help;
  std::function<OpCase(Sizes&, const AnyOp*)> make;
};

Into into_of(Sizes& s) {
  if (s.word("into_dy")) return Into::dy;
  return s.word("into_dresidual") ? Into::dresidual : Into::fresh;
}
Residual residual_of(Sizes& s) {
  const bool fused = s.word("fused"), in_place = s.word("in_place");
  return in_place ? Residual::in_place : fused ? Residual::separate : Residual::none;
}

/// `gelu`, `dgelu` and `f32` (a weight gradient) are forms of a linear layer; `scaled` adds to what c held.
OpCase make_matmul(Sizes& s, const AnyOp* v) {
  const Op<Matmul> op = pick(v, matmul);
  const int64_t M = s["M"], N = s["N"], K = s["K"];
  const Orientation o = s.orientation();
  const bool bias = s.word("bias");
  if (s.word("gelu")) return matmul_gelu_case(M, N, K, bias, op);
  if (s.word("dgelu")) return matmul_dgelu_case(M, N, K, op);
  if (s.word("f32")) return weight_gradient_case(K, M, N, s.word("accumulate"), s.word("dbias"), op);
  return matmul_case(M, N, K, o, bias, 1, s.word("scaled") ? 1.0f : 0.0f, op);
}

/// The exponent is num / den, or infinite when den is 0.
LinesCase lines_of(Sizes& s) {
  LinesCase of{.batch = s["batch"],
               .rows = s["rows"],
               .cols = s["cols"],
               .lines = s.word("columns") ? Lines::columns : Lines::rows,
               .q = {s["num"], s["den"]}};
  if (s.word("f64")) of.dtype = DType::f64;
  of.in_place = s.word("in_place");
  return of;
}

const std::vector<Maker>& makers() {
  using V = const AnyOp*;
  static const std::vector<Maker> table{
      {{"gelu_forward", "B,T,C", ""},
       [](Sizes& s, V v) { return gelu_forward_case(s["B"], s["T"], s["C"], pick(v, gelu_forward)); }},
      {{"gelu_backward", "B,T,C", "in_place"},
       [](Sizes& s, V v) {
         return gelu_backward_case(s["B"], s["T"], s["C"], s.word("in_place"), pick(v, gelu_backward));
       }},
      {{"layernorm_forward", "B,T,C", "fused in_place offset=N"},
       [](Sizes& s, V v) {
         const auto offset = static_cast<double>(s.get("offset", 0));
         return layernorm_forward_case(s["B"], s["T"], s["C"], residual_of(s), offset,
                                       pick(v, layernorm_forward));
       }},
      {{"layernorm_backward", "B,T,C", "residual accumulate into_dy into_dresidual"},
       [](Sizes& s, V v) {
         return layernorm_backward_case(s["B"], s["T"], s["C"], s.word("residual"), s.word("accumulate"),
                                        into_of(s), pick(v, layernorm_backward));
       }},
      {{"embedding_forward", "B,T,C,V", ""},
       [](Sizes& s, V v) {
         return embedding_forward_case(s["B"], s["T"], s["C"], s["V"], pick(v, embedding_forward));
       }},
      {{"embedding_backward", "B,T,C,V", "accumulate_wte accumulate_wpe"},
       [](Sizes& s, V v) {
         return embedding_backward_case(s["B"], s["T"], s["C"], s["V"], s.word("accumulate_wte"),
                                        s.word("accumulate_wpe"), pick(v, embedding_backward));
       }},
      {{"cross_entropy", "N,V,Vp", "gradient"},
       [](Sizes& s, V v) {
         return cross_entropy_case(s["N"], s["V"], s["Vp"], s.word("gradient"), pick(v, cross_entropy));
       }},
      {{"matmul", "M,N,K", "NN NT TN TT bias gelu dgelu f32 accumulate dbias scaled"}, make_matmul},
      {{"batched_matmul", "batch,M,K", "NN NT TN TT gram square"},
       [](Sizes& s, V v) {
         const Symmetry symmetry = s.word("square") ? Symmetry::square
                                   : s.word("gram") ? Symmetry::gram
                                                    : Symmetry::none;
         OpCase made = batched_matmul_case(s["batch"], s["M"], s["K"], symmetry, s.orientation(),
                                           pick(v, batched_matmul));
         s.get("N", 0);  // in the names, but follows from M
         return made;
       }},
      {{"bias_backward", "rows,N", "accumulate"},
       [](Sizes& s, V v) {
         return bias_backward_case(s["rows"], s["N"], s.word("accumulate"), pick(v, bias_backward));
       }},
      {{"attention_forward", "B,T,NH,HS", "row_max"},
       [](Sizes& s, V v) {
         return attention_forward_case(s["B"], s["T"], s["NH"], s["HS"], pick(v, attention_forward),
                                       s.word("row_max"));
       }},
      {{"attention_backward", "B,T,NH,HS", ""},
       [](Sizes& s, V v) {
         return attention_backward_case(s["B"], s["T"], s["NH"], s["HS"], pick(v, attention_backward));
       }},
      {{"cast", "rows,cols", "to_float to_f64 from_f64"},
       [](Sizes& s, V) {
         const bool to_f64 = s.word("to_f64"), from_f64 = s.word("from_f64");
         return to_f64 || from_f64 ? cast_wide_case(s["rows"], s["cols"], to_f64)
                                   : cast_case(s["rows"], s["cols"], s.word("to_float"));
       }},
      {{"transpose", "batch,rows,cols", ""},
       [](Sizes& s, V) { return transpose_case(s["batch"], s["rows"], s["cols"]); }},
      {{"sums_of_squares", "count,n", ""},
       [](Sizes& s, V) { return sums_of_squares_case(s["count"], s["n"]); }},
      {{"mean", "n", "accumulate"}, [](Sizes& s, V) { return mean_case(s["n"], s.word("accumulate")); }},
      {{"smooth", "count,n", "mean nesterov half_u half_g into sgd lion sign"},
       [](Sizes& s, V) {
         const bool sgd = s.word("sgd"), sign = s.word("sign"), lion = s.word("lion"),
                    nesterov = s.word("nesterov");
         if (s.word("into"))
           return smooth_into_case(s["count"], s["n"],
                                   sgd    ? SmoothRule::sgd
                                   : sign ? SmoothRule::sign
                                   : lion ? SmoothRule::lion
                                          : SmoothRule::nesterov);
         const bool remember = s.word("mean") || nesterov;
         const HalfSmooth half = s.word("half_u")   ? HalfSmooth::u
                                 : s.word("half_g") ? HalfSmooth::g
                                                    : HalfSmooth::none;
         return smooth_case(s["count"], s["n"], remember, nesterov, half);
       }},
      {{"adam_direction", "count,n", "m v into"},
       [](Sizes& s, V) { return adam_case(s["count"], s["n"], s.word("m"), s.word("v"), s.word("into")); }},
      {{"sign", "count,n", ""}, [](Sizes& s, V) { return sign_case(s["count"], s["n"]); }},
      {{"apply_update", "count,n", "cautious"},
       [](Sizes& s, V) { return apply_update_case(s["count"], s["n"], s.word("cautious")); }},
      {{"clip_factor", "n,limit", ""},
       [](Sizes& s, V) { return clip_factor_case(s["n"], static_cast<double>(s["limit"])); }},
      {{"head_max", "B,NH,T", "accumulate"},
       [](Sizes& s, V) { return head_max_case(s["B"], s["NH"], s["T"], s.word("accumulate")); }},
      {{"qk_clip", "count,NH,HS", "uneven"},
       [](Sizes& s, V) {
         return qk_clip_case(s["count"], s["NH"], s["HS"], s.word("uneven") ? 0.2f : 0.5f);
       }},
      {{"add_diagonal", "batch,n", ""}, [](Sizes& s, V) { return add_diagonal_case(s["batch"], s["n"]); }},
      {{"linear_backward", "rows,in,out", ""},
       [](Sizes& s, V) { return linear_backward_case(s["rows"], s["in"], s["out"]); }},
      {{"sum_of_squares", "n", ""}, [](Sizes& s, V) { return whole_tensor_case("sum_of_squares", s["n"]); }},
      {{"sum_abs", "n", ""}, [](Sizes& s, V) { return whole_tensor_case("sum_abs", s["n"]); }},
      {{"dot", "n", ""}, [](Sizes& s, V) { return whole_tensor_case("dot", s["n"]); }},
      {{"max_abs", "n", ""}, [](Sizes& s, V) { return whole_tensor_case("max_abs", s["n"]); }},
      {{"row_norms", "rows,cols", ""}, [](Sizes& s, V) { return norms_case(true, s["rows"], s["cols"]); }},
      {{"col_norms", "rows,cols", ""}, [](Sizes& s, V) { return norms_case(false, s["rows"], s["cols"]); }},
      {{"unit_lines", "rows,cols", "columns in_place into cautious norms"},
       [](Sizes& s, V) {
         const Lines lines = s.word("columns") ? Lines::columns : Lines::rows;
         if (s.word("norms")) return unit_lines_of_known_norms_case(lines, s["rows"], s["cols"]);
         return unit_lines_case(lines, s["rows"], s["cols"],
                                s.word("in_place")   ? UnitInto::g
                                : s.word("into")     ? UnitInto::w
                                : s.word("cautious") ? UnitInto::cautious
                                                     : UnitInto::u);
       }},
      {{"escape_sums", "n", "s then"},
       [](Sizes& s, V) { return escape_sums_case(s["n"], s.word("s"), s.word("then")); }},
      {{"line_norms", "batch,rows,cols,num,den", "columns f64"},
       [](Sizes& s, V) { return line_norms_case(lines_of(s)); }},
      {{"line_duals", "batch,rows,cols,num,den", "columns f64 in_place"},
       [](Sizes& s, V) { return line_duals_case(lines_of(s)); }},
      {{"hyperball", "count,n", "first into"},
       [](Sizes& s, V) { return hyperball_case(s["count"], s["n"], s.word("first"), s.word("into")); }},
      {{"scale_rows", "rows,cols", "divide in_place times"},
       [](Sizes& s, V) {
         if (s.word("times")) return scale_twice_case(s["rows"], s["cols"], s.word("divide"));
         return scale_case(true, s["rows"], s["cols"], s.word("divide"), s.word("in_place"));
       }},
      {{"scale_cols", "rows,cols", "divide in_place"}, [](Sizes& s, V) {
         return scale_case(false, s["rows"], s["cols"], s.word("divide"), s.word("in_place"));
       }}};
  return table;
}

const Maker* find_maker(const std::string& op) {
  for (const Maker& maker : makers())
    if (maker.help.op == op) return &maker;
  return nullptr;
}

/// True when the text names every size of the operation, so that it is one case.
bool complete(const Maker& maker, const Sizes& sizes) {
  const std::string& keys = maker.help.sizes;
  for (size_t start = 0; start < keys.size();) {
    const size_t end = std::min(keys.find(',', start), keys.size());
    if (!sizes.has(keys.substr(start, end - start))) return false;
    start = end + 1;
  }
  return true;
}

OpCase case_of_name(const std::string& name) {
  const size_t slash = name.find('/');
  if (slash == std::string::npos)
    throw std::runtime_error("'" + name + "' is no case, --cases, write OPERATION/SIZES");
  return make_case(name.substr(0, slash), name.substr(slash + 1));
}
}  // namespace

std::vector<OpHelp> known_operations() {
  std::vector<OpHelp> all;
  for (const Maker& maker : makers()) all.push_back(maker.help);
  return all;
}

std::string op_of(const OpCase& op_case) {
  return op_case.name.substr(0, op_case.name.find('/'));
}

OpCase make_case(const std::string& op, const std::string& sizes, const AnyOp* candidate) {
  const Maker* maker = find_maker(op);
  if (maker == nullptr) throw std::runtime_error("unknown operation, '" + op + "', see --list");
  Sizes parsed(sizes);
  OpCase made = maker->make(parsed, candidate);
  if (parsed.word("f64") && made.name.find(",f64") == std::string::npos) made = in_float64(made);
  parsed.expect_all_used();
  return made;
}

std::vector<OpCase> choose_cases(const std::string& op, const std::string& sizes) {
  Sizes parsed(sizes);
  const Maker* maker = op.empty() ? nullptr : find_maker(op);
  if (maker != nullptr && complete(*maker, parsed)) return {make_case(op, sizes)};
  TrainingSizes training;
  training.B = parsed.get("B", training.B);
  training.T = parsed.get("T", training.T);
  training.C = parsed.get("C", training.C);
  training.NH = parsed.get("NH", training.NH);
  training.V = parsed.get("V", training.V);
  training.chunk = parsed.get("chunk", training.chunk);
  parsed.expect_all_used();
  std::vector<OpCase> cases = training_cases(training);
  if (!op.empty()) std::erase_if(cases, [&](const OpCase& c) { return op_of(c) != op; });
  if (cases.empty())
    throw std::runtime_error("no such operation in a training step, '" + op + "', see --list");
  return cases;
}

std::vector<OpCase> read_cases(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read, " + path + ", check the path");
  std::vector<OpCase> cases;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    const size_t end = line.find_last_not_of(" \t\r");
    if (end != std::string::npos) cases.push_back(case_of_name(line.substr(0, end + 1)));
  }
  return cases;
}
