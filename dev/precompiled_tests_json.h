// The same for tests that include nlohmann/json.
#include <gtest/gtest.h>

#include "dev/precompiled_json.h"
