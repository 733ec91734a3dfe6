#include "level.h"

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

std::vector<const Level*> supported() {  // the best one last
  std::vector<const Level*> levels{&plain_level()};
  if (has_avx2()) levels.push_back(&avx2_level());
  if (has_avx512()) levels.push_back(&avx512_level());
  if (has_avx512_vnni()) levels.push_back(&avx512_vnni_level());
  if (has_avx512_vnni() && __builtin_cpu_supports("avx512bf16")) levels.push_back(&avx512_bf16_level());
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
