#ifndef VATTN_HPP_
#define VATTN_HPP_
#include "vattn.h"
#endif
