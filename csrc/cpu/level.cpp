// Defines the table of one instruction set's kernels.
#include "level.h"

#define BIDFMKD_NAME(level) BIDFMKD_NAME_(level)
#define BIDFMKD_NAME_(level) #level

namespace bidfmkd {

const Kernels BIDFMKD_TABLE{
    BIDFMKD_NAME(BIDFMKD_LEVEL),
    BIDFMKD_LEVEL::perturb,
    BIDFMKD_LEVEL::estimate_gradient,
    BIDFMKD_LEVEL::stream_fill,
    BIDFMKD_LEVEL::norm_pool,
    BIDFMKD_LEVEL::norm_pool_backward,
    BIDFMKD_LEVEL::norm_pool_double_backward,
};

}  // namespace bidfmkd
