// What this machine offers, as JSON.
#ifndef VATTN_RUNTIME_DOCTOR_H_
#define VATTN_RUNTIME_DOCTOR_H_

#include <string>

namespace vattn {

std::string DoctorJson();

}  // namespace vattn

#endif  // VATTN_RUNTIME_DOCTOR_H_
