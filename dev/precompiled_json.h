// The same for files that include nlohmann/json.
#include <nlohmann/json.hpp>

#include "dev/precompiled.h"
