// JSON and its text. The parser and the writer of nlohmann::json cost the compiler seconds in every file that
// mentions them, so they are compiled here, once: nobody else calls json::parse or dump, or writes a json
// into a stream.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

/// What `text` says; a discarded value, which is neither an object nor anything else, where it is not JSON.
nlohmann::json parse_json(std::string_view text);
nlohmann::ordered_json parse_ordered_json(std::string_view text);

/// The same, but nlohmann::json::parse_error, with the place in the text, where it is not JSON.
nlohmann::json require_json(std::string_view text);
/// The parser silently keeps the last of two equal keys; here `twice` becomes such a key of the outermost
/// object, if there is one.
nlohmann::json require_json(std::string_view text, std::string& twice);

/// The text of a value, on one line, or on many with `indent` spaces per level. Throws
/// nlohmann::json::type_error where a string is not UTF-8.
std::string json_text(const nlohmann::json& value, int indent = -1);
std::string json_text(const nlohmann::ordered_json& value, int indent = -1);

/// What the writer may use beyond ASCII.
enum class Characters : uint8_t { ascii, utf8 };
/// The text of a value on one line, where strings may hold anything: what is not UTF-8 becomes U+FFFD.
std::string lossy_json_text(const nlohmann::json& value, Characters characters);
