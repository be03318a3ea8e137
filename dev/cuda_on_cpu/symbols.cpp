#include "dev/cuda_on_cpu/symbols.h"

#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

#include "dev/cuda_on_cpu/async.h"

namespace cuda_on_cpu {
namespace {
struct Symbol {
  uintptr_t at;  // an address, or an offset in thread-local storage
  size_t bytes;
  std::string_view name;  // mangled
};

struct Symbols {
  uintptr_t load_address = 0;
  std::vector<Symbol> functions;      // by address
  std::vector<Symbol> thread_local_;  // static __shared__ becomes static thread_local
};

/// Reads the tables of one ELF file that lies in memory.
void read_tables(const char* file, Symbols& symbols) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* table = reinterpret_cast<const Elf64_Sym*>(file + sections[i].sh_offset);
    const char* names = file + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof *table; ++s) {
      const Elf64_Sym& entry = table[s];
      if (entry.st_shndx == SHN_UNDEF) continue;
      const Symbol symbol{entry.st_value, entry.st_size, names + entry.st_name};
      if (ELF64_ST_TYPE(entry.st_info) == STT_FUNC) symbols.functions.push_back(symbol);
      if (ELF64_ST_TYPE(entry.st_info) == STT_TLS) symbols.thread_local_.push_back(symbol);
    }
  }
  std::sort(symbols.functions.begin(), symbols.functions.end(),
            [](const Symbol& a, const Symbol& b) { return a.at < b.at; });
}

Symbols read_own() {
  Symbols symbols;
  const int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return symbols;
  const auto bytes = static_cast<size_t>(status.st_size);
  void* image = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);  // kept: names point into it
  close(file);
  if (image == MAP_FAILED || bytes < sizeof(Elf64_Ehdr) || std::memcmp(image, ELFMAG, SELFMAG) != 0)
    return symbols;
  dl_iterate_phdr(  // the program itself comes first
      [](dl_phdr_info* info, size_t, void* to) {
        *static_cast<uintptr_t*>(to) = info->dlpi_addr;
        return 1;
      },
      &symbols.load_address);
  read_tables(static_cast<const char*>(image), symbols);
  return symbols;
}

const Symbols& symbols() {
  static const Symbols* symbols = new Symbols(read_own());
  return *symbols;
}

const Symbol* find_function(const void* code) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(code) - symbols().load_address;
  const auto& functions = symbols().functions;
  auto after = std::upper_bound(functions.begin(), functions.end(), at,
                                [](uintptr_t a, const Symbol& s) { return a < s.at; });
  if (after == functions.begin()) return nullptr;
  const Symbol& found = *--after;
  return at < found.at + std::max<size_t>(found.bytes, 1) ? &found : nullptr;
}

std::string demangled(std::string_view name) {
  int status = 0;
  char* text = abi::__cxa_demangle(std::string(name).c_str(), nullptr, nullptr, &status);
  std::string words(status == 0 ? text : name);
  std::free(text);
  for (size_t at; (at = words.find("(anonymous namespace)::")) != std::string::npos;) words.erase(at, 23);
  return words;
}

/// This OS thread's copy of the program's thread-local variables.
char* thread_local_base() {
  char* base = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        *static_cast<char**>(to) = static_cast<char*>(info->dlpi_tls_data);
        return 1;
      },
      &base);
  return base;
}

/// A variable x inside of _Zfoo is called _ZZfooE1x.
std::vector<Symbol> variables_of(const void* kernel) {
  std::vector<Symbol> variables;
  const Symbol* function = find_function(kernel);
  if (function == nullptr || function->name.substr(0, 2) != "_Z") return variables;
  const std::string prefix = "_ZZ" + std::string(function->name.substr(2)) + "E";
  for (const Symbol& variable : symbols().thread_local_)
    if (variable.name.substr(0, prefix.size()) == prefix) variables.push_back(variable);
  return variables;
}
}  // namespace

std::string function_around(const void* code) {
  const Symbol* found = find_function(code);
  if (found != nullptr) return demangled(found->name);
  char text[32];
  std::snprintf(text, sizeof text, "%p", code);
  return text;
}

std::string function_name(const void* function) {
  // "void gelu_kernel<float, 4>(float*, ...)": the name is enough
  std::string words = function_around(function);
  const size_t end = words.find('(');
  if (end != std::string::npos) words.erase(end);
  if (words.rfind("void ", 0) == 0) words.erase(0, 5);
  return words;
}

namespace {
/// The static __shared__ variables of a kernel; looked up once for each.
const std::vector<Symbol>& static_shared(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, std::vector<Symbol>> known;
  thread_local const void* last = nullptr;
  thread_local const std::vector<Symbol>* variables = nullptr;
  if (kernel != last) {
    const std::lock_guard lock(mutex);
    const auto found = known.find(kernel);
    variables =
        found != known.end() ? &found->second : &known.emplace(kernel, variables_of(kernel)).first->second;
    last = kernel;
  }
  return *variables;
}
}  // namespace

size_t static_shared_bytes(const void* kernel) {
  size_t bytes = 0;
  if (kernel != nullptr)
    for (const Symbol& variable : static_shared(kernel)) bytes += variable.bytes;
  return bytes;
}

void poison_static_shared(const void* kernel) {
  if (kernel == nullptr) return;
  thread_local char* const base = thread_local_base();
  for (const Symbol& variable : static_shared(kernel))
    std::memset(base + variable.at, kPoisonByte, variable.bytes);
}

}  // namespace cuda_on_cpu
