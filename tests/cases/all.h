// The cases of every operation.
#pragma once

#include "tests/cases/attention.h"
#include "tests/cases/cast.h"
#include "tests/cases/cross_entropy.h"
#include "tests/cases/embedding.h"
#include "tests/cases/gelu.h"
#include "tests/cases/hyperball.h"
#include "tests/cases/layernorm.h"
#include "tests/cases/lines.h"
#include "tests/cases/matmul.h"
#include "tests/cases/qk_clip.h"
#include "tests/cases/reduce.h"
#include "tests/cases/unit_lines.h"
#include "tests/cases/update.h"
