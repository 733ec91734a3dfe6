// Which level runs: the best one that this processor has, or a lower one that was asked for.
#pragma once
#include <string>

#include "vectors.h"

namespace ptqbench {

const Level& current_level();

// Use at most the level of this name; "" removes the limit.
void limit_level(const std::string& name);

}  // namespace ptqbench
