import Foundation

/// Rows of text under headings, each column as wide as its widest cell.
struct Table: CustomStringConvertible {
  let columns: [String]
  let rows: [[String]]
  var rightAligned: Set<Int> = []

  var description: String {
    let lines = [columns] + rows
    let widths = columns.indices.map { column in lines.map { $0[column].count }.max()! }
    return lines.map { line in
      line.enumerated().map { column, cell in
        let space = String(repeating: " ", count: widths[column] - cell.count)
        if rightAligned.contains(column) { return space + cell }
        return column == columns.count - 1 ? cell : cell + space
      }.joined(separator: "  ")
    }.joined(separator: "\n")
  }
}

/// Prints a value as JSON with sorted keys.
func print(json value: some Encodable) throws {
  let encoder = JSONEncoder()
  encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
  print(String(decoding: try encoder.encode(value), as: UTF8.self))
}

/// Says something beside the command's output.
func note(_ text: String) {
  FileHandle.standardError.write(Data("smelt: \(text)\n".utf8))
}

/// A number with a fixed number of digits, the same in every locale.
func decimal(_ value: Double, _ digits: Int = 4) -> String {
  let text = String(format: "%.\(digits)f", value)
  // A small negative number is not printed as "-0.00".
  return text.contains { $0 != "-" && $0 != "0" && $0 != "." } ? text : text.filter { $0 != "-" }
}

/// A number with four significant digits.
func scientific(_ value: Double) -> String {
  // C writes the sign of a NaN too.
  value.isNaN ? "nan" : String(format: "%.3e", value)
}
