#include "level.h"

#include <ATen/cpu/Utils.h>

#include <vector>

namespace ptqbench {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// Whether there is a matrix engine, and the system lets this process use it.
bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         at::cpu::init_amx();
}

std::vector<const Level*> supported() {  // the best one last
  std::vector<const Level*> levels{&plain_level()};
  if (has_avx2()) levels.push_back(&avx2_level());
  if (has_avx512()) levels.push_back(&avx512_level());
  if (has_avx512_vnni()) levels.push_back(&avx512_vnni_level());
  if (has_avx512_bf16()) levels.push_back(&avx512_bf16_level());
  if (has_amx()) levels.push_back(&amx_level());
  return levels;
}

const Level* current = supported().back();

}  // namespace

const Level& current_level() { return *current; }

void limit_level(const std::string& name) {
  current = supported().back();
  for (const Level* level : supported())
    if (name == level->name) current = level;
}

}  // namespace ptqbench
