// The same for tests.
#include <gtest/gtest.h>

#include "dev/precompiled.h"
