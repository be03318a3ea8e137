#include "json_text.h"

#include <nlohmann/json.hpp>
#include <set>

using Json = nlohmann::json;

Json parse_json(std::string_view text) {
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

nlohmann::ordered_json parse_ordered_json(std::string_view text) {
  return nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
}

Json require_json(std::string_view text) {
  return Json::parse(text);
}

Json require_json(std::string_view text, std::string& twice) {
  std::set<std::string> seen;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key && !seen.insert(parsed.get<std::string>()).second)
      twice = parsed.get<std::string>();
    return true;
  };
  return Json::parse(text, watch);
}

std::string json_text(const Json& value, int indent) {
  return value.dump(indent);
}

std::string json_text(const nlohmann::ordered_json& value, int indent) {
  return value.dump(indent);
}

std::string lossy_json_text(const Json& value, Characters characters) {
  return value.dump(-1, ' ', characters == Characters::ascii, Json::error_handler_t::replace);
}
